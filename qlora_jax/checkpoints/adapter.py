"""Adapters out of a model and into one, in PEFT's format (`adapter_file.py`).

Both directions walk the same list (`adapter_parts.py`): every array that is trained, with its PEFT
name, and where it lies in the model.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np
from safetensors.numpy import save_file

from qlora_jax.checkpoints.adapter_config import CONFIG, config_to_json
from qlora_jax.checkpoints.adapter_file import (
    PREFIX,
    TOKENS,
    WEIGHTS,
    PeftAdapter,
    check_copies,
    check_head_rows,
    read_adapter,
)
from qlora_jax.checkpoints.adapter_parts import (
    Part,
    adapted_layers,
    adapted_modules,
    base_tensors,
    put,
    token_modules,
    trained_parts,
)
from qlora_jax.checkpoints.packed_experts import expert_cuts, plainly_scaled
from qlora_jax.checkpoints.text_part import whole_lora, whole_name
from qlora_jax.data import Tokenizer
from qlora_jax.files import replace_file
from qlora_jax.models import (
    FAMILIES,
    Decoder,
    EncoderClassifier,
    EncoderDecoder,
    module_names,
    resize_token_embeddings,
    train_rows_of,
)
from qlora_jax.nn import LoraConfig, TrainedParam
from qlora_jax.nn.targets import ALSO_CALLED
from qlora_jax.processes import is_first, whole

# The second name under which PEFT wants a trained embedding that is its head, too.
_TIED = "lm_head.weight"
# PEFT's task by the kind of model.
_TASKS = {
    "Decoder": "CAUSAL_LM",
    "EncoderDecoder": "SEQ_2_SEQ_LM",
    "EncoderClassifier": "SEQ_CLS",
}


def save_adapter(
    folder: str | Path,
    model: Any,
    lora_config: LoraConfig,
    base_name: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes all that a model has trained for PEFT, in the dtype it has here. Of several processes
    all call it, and the first writes.

    Args:
        folder: made if missing; each file is put in place whole or not at all, the weights first.
        model: with adapters.
        lora_config: what they were built with.
        base_name: the base model's name or folder, as PEFT should find it.
        tokenizer: written beside, where tokens were added to it.

    Raises:
        ValueError: the model has no adapters, or not the ones of this configuration.
        TypeError: it is no model of this package.
    """
    _check_model(model)
    if not any(True for _ in adapted_layers(model)):
        raise ValueError("The model has no adapters to save: build or load it with a LoraConfig.")
    advice = "give the one that the model was built with"
    _check_same(model, lora_config, "lora_config", advice)
    _check_whole(model, lora_config, "lora_config", advice)
    tensors = _trained_tensors(model, lora_config)
    lora_config = plainly_scaled(lora_config, adapted_modules(model, lora_config))
    heads = _heads(model, lora_config)
    if heads:
        modules = (*(lora_config.modules_to_save or ()), *sorted(heads))
        lora_config = replace(lora_config, modules_to_save=modules)
    tied = getattr(model.config, "tie_word_embeddings", False)
    for module, others in ALSO_CALLED.items():
        weight = tensors.get(f"{module}.weight")
        if weight is None or tied:
            continue
        # PEFT passes over the names that its version of transformers does not know.
        tensors |= {f"{other}.weight": weight.copy() for other in others}
        names = dict.fromkeys((*(lora_config.modules_to_save or ()), module, *others))
        lora_config = replace(lora_config, modules_to_save=tuple(names))
    sees = getattr(model.config, "sees", False)
    named = whole_name if sees else str
    if sees:
        lora_config = whole_lora(lora_config, adapted_modules(model, lora_config))
    config = config_to_json(
        lora_config,
        base_name=str(base_name),
        targets=_targets(model, lora_config),
        task_type=_TASKS[type(model).__name__],
    )
    trained = {m: e for m, e in token_modules(model).items() if e.token_ids is not None}
    if trained:
        config["trainable_token_indices"] = {
            named(module): e.token_ids.get_value().tolist() for module, e in trained.items()
        }
    if tied:
        # Our head is the embedding itself; PEFT trains a copy unless it is told.
        saved = [m for m, e in token_modules(model).items() if isinstance(e.weight, TrainedParam)]
        if saved or trained:
            config["ensure_weight_tying"] = True
        for module in saved:
            tensors[_TIED] = tensors[f"{module}.weight"].copy()
    tensors = {PREFIX + named(name): tensor for name, tensor in tensors.items()}
    if not is_first():
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt"}))
    replace_file(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    if tokenizer is not None:
        tokenizer.save(folder)


def _trained_tensors(model: Any, lora: LoraConfig) -> dict[str, np.ndarray]:
    """All that a model has trained, by PEFT's names without its prefix."""
    tensors, arrays = {}, dict[int, np.ndarray]()
    for part in trained_parts(model, lora):
        key = id(part.variable)
        if key not in arrays:
            arrays[key] = whole(part.variable.get_value())
        tensors[part.names[0]] = part.taken(arrays[key])
    return tensors


def _targets(model: Any, lora: LoraConfig) -> tuple[str, ...] | str:
    """`target_modules` for PEFT: as given, but "all-linear" by name, since PEFT's idea of what is
    linear depends on how a model is implemented there."""
    if isinstance(lora.target_modules, tuple):
        return tuple(sorted(lora.target_modules))
    if lora.target_modules != "all-linear":
        return lora.target_modules
    names = adapted_modules(model, lora)
    ends = {name.rpartition(".")[2] for name in names}
    every = module_names(FAMILIES[model.config.model_type].weight_names(model.config))
    others = {module for modules in every.values() for module in modules} - set(names)
    if lora.layers_to_transform is None and any(o.rpartition(".")[2] in ends for o in others):
        # A last name alone would also mean a module that has no adapter.
        return tuple(names)
    return tuple(sorted(ends))


def load_adapter(folder: str | Path, model: Any) -> None:
    """Puts a PEFT adapter's numbers into a model, in place. Tokens that were added with it are
    added to the model, too (not to its tokenizer, which lies beside the adapter).

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        model: built with the adapter's own configuration (`read_adapter_config(folder)` gives it).

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: the adapter is damaged, or does not fit the model: another rank, scaling, other
            modules or another base. The model is then as it was.
        TypeError: the model is none of this package.
    """
    _check_model(model)
    adapter = read_adapter(folder)
    tensors = _tensors(adapter, model)
    advice = "build the model with read_adapter_config(folder)"
    _check_tied(model, adapter)
    check_copies(folder, tensors)
    check_head_rows(folder, tensors, token_modules(model))
    if getattr(model.config, "tie_word_embeddings", False):
        tensors.pop(_TIED, None)
    _check_same(model, adapter.config, str(folder), advice)
    _check_whole(model, adapter.config, str(folder), advice)
    rows = _token_rows(model, adapter, tensors)
    parts = _parts(model, adapter, tensors, advice)
    _refuse_left(folder, tensors)
    put(parts)
    largest = max((max(ids) for _, ids, _ in rows), default=-1)
    if largest >= model.config.vocab_size:
        resize_token_embeddings(model, largest + 1)
    for embedding, ids, found in rows:
        train_rows_of(embedding, ids)
        order = embedding.token_ids.get_value().tolist()
        places = jnp.asarray([order.index(id_) for id_ in ids])
        values = embedding.token_rows.get_value()
        embedding.token_rows.set_value(values.at[places].set(jnp.asarray(found, values.dtype)))


def _token_rows(
    model: Any, adapter: PeftAdapter, tensors: dict[str, np.ndarray]
) -> list[tuple[Any, tuple[int, ...], np.ndarray]]:
    """(embedding, ids, rows) of the tokens that an adapter trained, taken out of its tensors."""
    taken = []
    for module, embedding in token_modules(model).items():
        for named, ids in adapter.token_ids.items():
            if module != named and not module.endswith(f".{named}"):
                continue
            found = tensors.pop(f"{module}.{TOKENS}", None)
            expected = (len(ids), embedding.weight.get_value().shape[1])
            if found is None or found.shape != expected:
                shape = "missing" if found is None else f"of shape {list(found.shape)}"
                raise ValueError(
                    f"{adapter.folder}: the rows of {len(ids)} trained tokens of {module!r} are "
                    f"{shape}, but {list(expected)} is needed: the adapter is of another base "
                    "model, or damaged."
                )
            taken.append((embedding, ids, found))
    return taken


def _parts(
    model: Any, adapter: PeftAdapter, tensors: dict[str, np.ndarray], advice: str
) -> list[tuple[Part, np.ndarray]]:
    """What the model trains, token rows left out, and an adapter's numbers for it, taken out of its
    tensors."""
    tokens = {f"{module}.{TOKENS}" for module in token_modules(model)}
    taken = []
    for part in trained_parts(model, adapter.config):
        if part.names[0] in tokens:
            continue
        copies = {name: tensors.pop(name) for name in part.names if name in tensors}
        if not copies:
            raise ValueError(
                f"{adapter.folder} lacks {part.names[0]!r}, but the model trains it: {advice}."
            )
        (name, tensor), *others = copies.items()
        apart = next((other for other, x in others if not np.array_equal(x, tensor)), None)
        if apart is not None:
            raise ValueError(
                f"{adapter.folder} has trained {name!r} and {apart!r} apart, which are one matrix "
                "here: use the adapter in PEFT."
            )
        if tensor.shape != part.shape:
            raise ValueError(
                f"{adapter.folder}: {name!r} has shape {list(tensor.shape)}, but the model's is "
                f"{list(part.shape)}: the adapter was trained with another rank or on another base "
                "model."
            )
        taken.append((part, tensor))
    return taken


def _refuse_left(folder: str | Path, tensors: dict[str, np.ndarray]) -> None:
    """Refuses an adapter of which something has no place in the model."""
    if "lm_head.lora_A.weight" in tensors:
        raise ValueError(
            f"{folder} has an adapter of 'lm_head', but linear layers below the head alone take "
            "one here: merge it into its base, with `qlora-jax merge --no-report`."
        )
    if tensors:
        raise ValueError(
            f"{folder} holds {sorted(tensors)[0]!r} (and {len(tensors) - 1} more) that the model "
            "does not adapt: build it with read_adapter_config(folder), on the adapter's own base."
        )


def _tensors(adapter: PeftAdapter, model: Any) -> dict[str, np.ndarray]:
    """An adapter's tensors by name, those of packed experts as each expert's own."""
    tensors = dict(adapter.tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    cuts = expert_cuts(adapter.folder, shapes, adapter.config, model.config, adapter.version)
    own = {name: cut.of(tensors[cut.name]) for name, cut in cuts.items()}
    packed = {cut.name for cut in cuts.values()}
    return {name: x for name, x in tensors.items() if name not in packed} | own


def _check_model(model: Any) -> None:
    """Refuses a module for whose layers PEFT has no names."""
    if not isinstance(model, Decoder | EncoderDecoder | EncoderClassifier):
        raise TypeError(
            f"model is a {type(model).__name__}, but PEFT's format names the layers of "
            "load_pretrained's models alone: save and restore nnx.state(model, nnx.LoRAParam) of "
            "a module of your own with Orbax."
        )


def _check_same(model: Any, lora: LoraConfig, what: str, advice: str) -> None:
    """Refuses a configuration whose adapters are not the model's."""
    for adapted in adapted_layers(model):
        largest = 0
        for number, module in enumerate(adapted.modules):
            own, has = lora.at(module), adapted.scaling(number)
            if has and own is None:
                raise ValueError(
                    f"{what} lacks an adapter of {module!r}, but the model adapts it: {advice}."
                )
            if own is None:
                continue
            largest = max(largest, own.r)
            if not np.isclose(own.scaling, has, rtol=1e-6):
                raise ValueError(
                    f"{what} scales its adapters by {own.scaling:g} and the model by {has:g} "
                    f"({module}): {advice}."
                )
        assert adapted.layer.lora_A is not None
        rank = adapted.layer.lora_A.get_value().shape[-2]
        if largest != rank:
            raise ValueError(
                f"{what} has rank {largest} at {adapted.path}, but the model has {rank}: it is of "
                f"another rank or on another base; {advice}."
            )
        built = adapted.layer.lora
        assert built is not None
        if (lora.changes_base or built.changes_base) and _start(lora) != _start(built):
            raise ValueError(
                f"{what} starts its adapters by {_start(lora)}, the model at {adapted.path} by "
                f"{_start(built)}, which leave different base weights: {advice}."
            )
        if lora.use_dora != (adapted.layer.lora_magnitude_vector is not None):
            raise ValueError(
                f"{what} has use_dora={lora.use_dora}, but the model at {adapted.path} does "
                f"{'not ' if lora.use_dora else ''}have DoRA's magnitudes: {advice}."
            )
        if lora.use_dora and adapted.layer.row_squares is None:
            raise ValueError(
                f"the model at {adapted.path} was settled for writing (settle_adapters) and has no "
                "DoRA magnitudes any more: save before that, and load into a model as built."
            )


def _start(lora: LoraConfig) -> str:
    rounds = f", {lora.loftq_iter} round(s)" if lora.init_lora_weights == "loftq" else ""
    return f"init_lora_weights={lora.init_lora_weights!r}{rounds}"


def _check_whole(model: Any, lora: LoraConfig, what: str, advice: str) -> None:
    """Refuses a configuration that trains whole what the model keeps frozen."""
    # Not by name alone: "all-linear" means whatever is linear, and a norm may have a bias.
    adapted = adapted_modules(model, lora)
    for name, variable in base_tensors(model):
        module, _, kind = name.rpartition(".")
        biased = lora.bias == "all" or (lora.bias == "lora_only" and module in adapted)
        asked = lora.saves(module) or (kind == "bias" and biased)
        if asked and not isinstance(variable, TrainedParam):
            raise ValueError(
                f"{what} has modules_to_save={lora.modules_to_save!r} and bias={lora.bias!r}, but "
                f"the model keeps {name!r} frozen: {advice}."
            )


def _heads(model: Any, lora: LoraConfig) -> set[str]:
    """Modules that a model trains whole without being asked: a classifier's head."""
    biases = lora.bias != "none"
    return {
        name.partition(".")[0]
        for name, variable in base_tensors(model)
        if isinstance(variable, TrainedParam)
        and not lora.saves(name.rpartition(".")[0])
        and not (biases and name.endswith(".bias"))
    }


def _check_tied(model: Any, adapter: PeftAdapter) -> None:
    """Refuses an adapter that has trained embedding and head apart where they are one here."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    heads = [m for m in token_modules(model) if adapter.config.saves(m)]
    if not heads and not adapter.config.saves("lm_head"):
        return
    names = (_TIED, *(f"{module}.weight" for module in heads))
    copies = [adapter.tensors[name] for name in names if name in adapter.tensors]
    alike = len(copies) == 2 and np.array_equal(copies[0], copies[1])
    if not adapter.ties and not alike:
        raise ValueError(
            f"{adapter.folder} trains {', '.join(heads) or 'lm_head'} as a copy apart from the "
            "matrix that this base shares between embedding and head, which a tied model cannot "
            "hold: train it in PEFT with ensure_weight_tying=True."
        )
