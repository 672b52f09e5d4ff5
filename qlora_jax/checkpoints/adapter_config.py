"""`adapter_config.json`: PEFT's `LoraConfig` as a file, read into ours and written from it.

Any version's file is read (what it does not name has PEFT's default). What a field asks for is
either applied here exactly, or the adapter is refused; fields that only concern training in PEFT
(`inference_mode`, `runtime_config`, ...) are passed over.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qlora_jax.checkpoints.packed_experts import expert_config
from qlora_jax.checkpoints.text_part import adapted_inside, text_config
from qlora_jax.data.json_file import read_json
from qlora_jax.nn import LoraConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Switches that change what an adapter computes, and that are not known here.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
# Starts of A and B that change the base's weights in a way that cannot be repeated here.
_UNREPEATABLE = ("olora", "corda", "lora_ga", "pissa_niter")


def read_adapter_config(folder: str | Path) -> LoraConfig:
    """The `LoraConfig` of a saved adapter: what to build a model with before `load_adapter`.

    Raises:
        FileNotFoundError: there is no adapter_config.json.
        ValueError: it asks for what is not supported here, or is no LoRA.
    """
    return config_from_json(read_config_json(folder), Path(folder) / CONFIG)


def read_config_json(folder: str | Path) -> dict[str, Any]:
    """The content of a folder's adapter_config.json, its names those of a text model, whose experts
    are modules.

    Raises:
        FileNotFoundError: there is none; it has `target_parameters`, and no tensors are beside it.
        ValueError: it holds no JSON object; it adapts parameters that are no experts'; it chooses
            layers by an expression or parameters, and the tensors beside it are damaged.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        inside = Path(folder) / "adapter"  # of a run folder
        found = f" ({inside} is one)" if (inside / CONFIG).is_file() else ""
        raise FileNotFoundError(
            f"{path} does not exist: give an adapter's folder, as PEFT's save_pretrained wrote it"
            f"{found}."
        )
    config = read_json(path)
    targets, weights = config.get("target_modules"), Path(folder) / WEIGHTS
    if isinstance(targets, str) and weights.is_file():
        # An expression for paths in a larger model: which of them it means, the tensors tell.
        config["target_modules"] = adapted_inside(weights) or targets
    config = text_config(config)
    parameters = config.get("target_parameters")
    if not parameters:
        return config
    _check_kinds(config, path)
    if not weights.is_file():
        raise FileNotFoundError(
            f"{path} has target_parameters {parameters!r}, whose layers the tensors tell, but "
            f"{WEIGHTS} is not beside it{without_weights(path.parent)}."
        )
    return expert_config(config, path, weights)


def without_weights(folder: Path) -> str:
    """How to mend an adapter's folder that has none, to end a message."""
    pickle = folder / "adapter_model.bin"
    if not pickle.is_file():
        return ": give the folder that PEFT's save_pretrained wrote"
    return (
        f"; {pickle.name} is a pickle and never read here: load it once in PEFT and save it with "
        "`safe_serialization=True`"
    )


def config_from_json(config: Mapping[str, Any], path: Path) -> LoraConfig:
    """The `LoraConfig` of an adapter_config.json's content; raises as `read_adapter_config`."""
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path} has peft_type {config.get('peft_type')!r}, but only 'LORA' adapters are read."
        )
    unsupported = next((name for name in _UNSUPPORTED if config.get(name)), None)
    if unsupported is not None:
        raise ValueError(
            f"{path} sets {unsupported} to {config[unsupported]!r}, which is not supported here: "
            "use an adapter trained without it."
        )
    _check_kinds(config, path)
    targets = config.get("target_modules")
    if not targets:
        raise ValueError(
            f"{path} has target_modules {targets!r}, for which PEFT takes a list of its own: write "
            "the names of the adapted layers there."
        )
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = "all-linear"
    names: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) and value else value or None
        for name in ("exclude_modules", "layers_pattern", "modules_to_save")
        for value in [config.get(name)]
    }
    layers = config.get("layers_to_transform")
    return LoraConfig(
        r=int(config["r"]),
        alpha=config["lora_alpha"],
        lora_dropout=float(config.get("lora_dropout") or 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=bool(config.get("use_rslora", False)),
        use_dora=bool(config.get("use_dora", False)),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        layers_to_transform=tuple(layers) if isinstance(layers, list) else layers,
        bias=config.get("bias", "none"),
        **names,
        **_init(config, path),
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return _whole(value) or isinstance(value, float)


def _pattern(value: Any) -> bool:
    """A name, or a regular expression."""
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return isinstance(value, str)


def _listed_as(value: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(test(entry) for entry in value)


def _names(value: Any) -> bool:
    return value is None or _pattern(value) or _listed_as(value, _is_text)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _patterns(value: Any, test: Callable[[Any], bool]) -> bool:
    if value is None:
        return True
    # They become part of an expression, in which no flags may stand.
    return isinstance(value, dict) and all(
        _pattern(k) and _pattern(f"({k})") and test(v) for k, v in value.items()
    )


def _loftq(value: Any) -> bool:
    fields = ("loftq_bits", "loftq_iter")
    return value is None or (
        isinstance(value, dict) and all(_whole(value.get(name, 1)) for name in fields)
    )


def _token_ids(value: Any) -> bool:
    lists = value.values() if isinstance(value, dict) else [value or []]
    return all(_listed_as(ids, lambda id_: _whole(id_) and id_ >= 0) for ids in lists)


# Field → what it has to be, and the test of that. What PEFT gives no default has to be there.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a whole number", _whole),
    "lora_alpha": ("a number", _real),
    "lora_dropout": ("a number", lambda value: value is None or _real(value)),
    "target_modules": ("a list of names or a regular expression", _names),
    "target_parameters": ("a list of names", lambda x: not x or _listed_as(x, _is_text)),
    "exclude_modules": ("a list of names or a regular expression", _names),
    "layers_pattern": ("a list of names or one", _names),
    "modules_to_save": ("a list of names", _names),
    "rank_pattern": ("names with whole numbers", lambda value: _patterns(value, _whole)),
    "alpha_pattern": ("names with numbers", lambda value: _patterns(value, _real)),
    "layers_to_transform": (
        "a list of whole numbers or one",
        lambda value: value is None or _whole(value) or _listed_as(value, _whole),
    ),
    "loftq_config": ("an object of whole numbers", _loftq),
    "trainable_token_indices": ("a list of token ids, or one for each module", _token_ids),
}


def _check_kinds(config: Mapping[str, Any], path: Path) -> None:
    for name, (wanted, test) in _KINDS.items():
        if not test(config.get(name)):
            raise ValueError(
                f"{path} has {name} {config.get(name)!r}, but {wanted} is needed: fetch the "
                "adapter again."
            )


def _init(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """How A and B started, where that has changed the base that they belong to."""
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_UNREPEATABLE):
        raise ValueError(
            f"{path} has init_lora_weights {config['init_lora_weights']!r}, which changed the base "
            "that the adapter was trained on: in PEFT, save it as a plain LoRA with "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )
    if init == "pissa":
        return {"init_lora_weights": "pissa"}
    if init != "loftq":
        return {}
    loftq = config.get("loftq_config") or {}
    if loftq.get("loftq_bits", 4) != 4:
        raise ValueError(
            f"{path} has loftq_config {loftq!r}, but only 4-bit bases are made here: use the "
            "adapter in PEFT."
        )
    rounds = int(loftq.get("loftq_iter", 1))
    # One round leaves the base that plain quantization gives.
    return {"init_lora_weights": "loftq", "loftq_iter": rounds} if rounds > 1 else {}


def config_to_json(
    lora: LoraConfig, *, base_name: str, targets: tuple[str, ...] | str, task_type: str
) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        lora: what the adapters were built with.
        base_name: the base model's name or folder.
        targets: `target_modules` as PEFT is to match them.
        task_type: PEFT's, such as "CAUSAL_LM".
    """
    init: bool | str = lora.init_lora_weights if lora.changes_base else True
    config = {
        "alpha_pattern": dict(lora.alpha_pattern),
        "base_model_name_or_path": base_name,
        "bias": lora.bias,
        "exclude_modules": _listed(lora.exclude_modules),
        "fan_in_fan_out": False,
        "inference_mode": True,
        # PEFT repeats a start that changes the base when it loads; any other has done its work.
        "init_lora_weights": init,
        "layers_pattern": _listed(lora.layers_pattern),
        "layers_to_transform": _listed(lora.layers_to_transform),
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.lora_dropout,
        "modules_to_save": _listed(lora.modules_to_save),
        "peft_type": "LORA",
        "r": lora.r,
        "rank_pattern": dict(lora.rank_pattern),
        "target_modules": _listed(targets),
        "task_type": task_type,
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }
    if init == "loftq":
        config["loftq_config"] = {"loftq_bits": 4, "loftq_iter": lora.loftq_iter}
    return config


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
