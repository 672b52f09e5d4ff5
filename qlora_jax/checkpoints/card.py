"""The model card of an adapter or a model: what it was made from, how, and how well it does.

Nothing is asked of the author that the files know. An adapter's folder says its base and rank; the
run folder around it, where it still lies in one, adds data, hyperparameters, metrics and the
environment:

    run/config.json     how it was trained          run/adapter/    what is published
    run/result.json     how well it did
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from qlora_jax.data.json_file import read_json

CARD = "README.md"
_RUN_FILES = ("config.json", "result.json")
# PEFT's task type → how the class of a base ends, transformers' class to load it, the hub's task.
_TASKS = {
    "CAUSAL_LM": ("ForCausalLM", "AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": (
        "ForConditionalGeneration",
        "AutoModelForSeq2SeqLM",
        "text2text-generation",
    ),
    "SEQ_CLS": (
        "ForSequenceClassification",
        "AutoModelForSequenceClassification",
        "text-classification",
    ),
}


def read_facts(folder: str | Path) -> dict[str, Any]:
    """What the files of a folder, and of the run folder around it, tell.

    Returns:
        `adapter` (adapter_config.json), `model` (config.json), `run` (the run's config.json) and
        `result` (its result.json), those that there are.

    Raises:
        ValueError: one of them holds no JSON object.
    """
    folder = Path(folder)
    facts = {"adapter": folder / "adapter_config.json", "model": folder / "config.json"}
    if all((folder.parent / name).is_file() for name in _RUN_FILES):
        facts |= {"run": folder.parent / "config.json", "result": folder.parent / "result.json"}
    return {key: read_json(path) for key, path in facts.items() if path.is_file()}


def model_card(name: str, facts: Mapping[str, Any]) -> str:
    """A README.md with the hub's metadata block.

    Args:
        name: `org/name`, or a title.
        facts: as `read_facts` gives them; `base`, `datasets`, `license`, `language` and `metrics`
            (name → value) are taken before what the files say.
    """
    adapter, run = facts.get("adapter", {}), facts.get("run", {})
    result = facts.get("result", {})
    base = facts.get("base") or _base(run) or adapter.get("base_model_name_or_path")
    datasets = facts.get("datasets") or _datasets(run)
    auto, task = _task(adapter, {} if adapter else facts.get("model", {}))
    data = ModelCardData(
        base_model=base if _is_hub_name(base) else None,
        datasets=[name for name in datasets if _is_hub_name(name)] or None,
        license=facts.get("license"),
        language=facts.get("language"),
        library_name="peft" if adapter else "transformers",
        pipeline_tag=task,
        tags=["qlora", "qlora-jax", *(["lora"] if adapter else [])],
    )
    metrics = facts.get("metrics") or _metrics(result)
    quantization = (facts.get("model") or {}).get("quantization_config")
    sections = [
        _title(name, base, bool(adapter)),
        _use(name, base, bool(adapter), auto),
        _list("Data", datasets),
        _table("Adapter", _adapter(adapter)),
        _table("Quantization", quantization),
        _table("Hyperparameters", _hyperparameters(run)),
        _table("Results", metrics),
        _table("Environment", _environment(run, result)),
    ]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"
    return str(ModelCard(text))


def _is_hub_name(name: Any) -> bool:
    return isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/"))


def _title(name: str, base: str | None, adapter: bool) -> str:
    what = "A LoRA adapter" if adapter else "A model"
    source = f" for `{base}`" if base else ""
    return f"# {name.rpartition('/')[2]}\n\n{what}{source}, made with qlora-jax (QLoRA in JAX)."


def _task(adapter: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[str, str]:
    """transformers' class to load the model with, and the hub's name of its task."""
    classes = model.get("architectures") or [""]
    for task, (ending, auto, hub) in _TASKS.items():
        if task == adapter.get("task_type") or str(classes[0]).endswith(ending):
            return auto, hub
    return _TASKS["CAUSAL_LM"][1:]


def _use(name: str, base: str | None, adapter: bool, auto: str) -> str:
    if adapter:
        lines = [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            "",
            f'base = {auto}.from_pretrained("{base or "the base model"}")',
            f'model = PeftModel.from_pretrained(base, "{name}")',
        ]
    else:
        lines = [
            f"from transformers import {auto}",
            "",
            f'model = {auto}.from_pretrained("{name}")',
        ]
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def _table(title: str, rows: Mapping[str, Any] | None) -> str:
    shown = {key: value for key, value in _flat(rows or {}) if value not in (None, "", [], {})}
    if not shown:
        return ""
    lines = [f"| {key} | {_cell(value)} |" for key, value in shown.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def _list(title: str, items: list[str]) -> str:
    return "\n".join([f"## {title}", "", *(f"- `{item}`" for item in items)]) if items else ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    # A cell is one line, and its bars would be taken for the table's.
    return str(value).replace("|", "\\|").replace("\n", " ")


def _adapter(adapter: Mapping[str, Any]) -> dict[str, Any]:
    targets = ("target_modules", "target_parameters")
    names = ("r", "lora_alpha", "lora_dropout", *targets, "use_rslora", "use_dora")
    return {name: adapter[name] for name in names if adapter.get(name)}


def _base(run: Mapping[str, Any]) -> str | None:
    """The run's own name of its base; the adapter may only know a folder of the cache."""
    return run.get("run", {}).get("model", {}).get("source")


def _datasets(run: Mapping[str, Any]) -> list[str]:
    source = run.get("run", {}).get("data", {}).get("source")
    return [source] if source else []


def _hyperparameters(run: Mapping[str, Any]) -> dict[str, Any]:
    """All but what stands elsewhere on the card."""
    return dict(run.get("train", {})) | {
        key: value for key, value in run.get("run", {}).items() if key != "lora"
    }


def _metrics(result: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("before", "after", "steps", "trained_tokens", "tokens_per_second")
    return {name: result[name] for name in kept if name in result}


def _environment(run: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    versions = result.get("versions") or run.get("versions") or {}
    device = result.get("device")
    return dict(versions) | ({"device": device} if device else {})
