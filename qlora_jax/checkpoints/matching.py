"""Which place in a model is each tensor of a checkpoint for, and does it fit?

A model is built in shapes alone, every name, shape and dtype of the checkpoint is compared with it,
and only then does anybody read a number. Which linear layers are dense and which in 4 bits is the
checkpoint's to say, if it is quantized already.
"""

import dataclasses
import functools
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.checkpoints.checkpoint import DTYPES, Checkpoint
from qlora_jax.models import FAMILIES, EncoderDecoderConfig, Family, Slot, family_of
from qlora_jax.models.embedding import Embedding
from qlora_jax.quant import QuantConfig, QuantizedTensor


def linear_weights(checkpoint: Checkpoint) -> frozenset[str]:
    """The tensors that `load_model` quantizes: the layers' linear weights.

    Raises:
        ValueError: an unknown architecture.
    """
    family, model = _abstract(checkpoint, checkpoint.quant or QuantConfig())
    return frozenset(
        name
        for name, slot in family.weight_names(model.config).items()
        if isinstance(node_at(model, slot.path).get_value(), QuantizedTensor)
    )


def check_shapes(checkpoint: Checkpoint) -> None:
    """Compares every name, shape and dtype with config.json, as `load_model` does; reads nothing.

    Raises:
        ValueError: an unknown architecture, or tensors that contradict the config.
    """
    matching(checkpoint, *_abstract(checkpoint, checkpoint.quant))


def _abstract(checkpoint: Checkpoint, quant: QuantConfig | None) -> tuple[Family, Any]:
    """The checkpoint's family, and its model in shapes alone."""
    family = family_of(checkpoint.config)
    config = family.for_weights(family.read_config(checkpoint.config), checkpoint.tensors)
    model = nnx.eval_shape(lambda: family.build(config, quant=quant, rngs=nnx.Rngs(0)))
    keep_dense(model, checkpoint, family.weight_names(config), jnp.float32)
    return family, model


def keep_dense(
    model: nnx.Module, checkpoint: Checkpoint, names: Mapping[str, Slot], dtype: Any
) -> None:
    """Makes room for dense numbers where a checkpoint in 4 bits holds dense ones, in place.

    transformers leaves some linear layers out (`llm_int8_skip_modules`, T5's `wo`). What the
    checkpoint holds decides, as config.json does not say all of it.

    Args:
        model: abstract, with every linear layer of its stacks quantized.
        checkpoint: what will be read; nothing changes if it is not in 4 bits.
        names: of the model's tensors.
        dtype: of dense weights.

    Raises:
        ValueError: only some layers of a stack are dense.
    """
    if checkpoint.quant is None:
        return
    dense: dict[tuple[str, ...], str] = {}
    packed: dict[tuple[str, ...], str] = {}
    for name, slot in names.items():
        info = checkpoint.tensors.get(name)
        # Codes that have lost their quant_state are refused where all tensors are.
        if info is not None and (info.quant is not None or info.dtype in DTYPES):
            (packed if info.quant else dense)[slot.path] = name
    for path, name in dense.items():
        variable = node_at(model, path)
        value = variable.get_value()
        if not isinstance(value, QuantizedTensor) or is_vocabulary(model, names[name]):
            continue
        if path in packed:
            raise ValueError(
                f"{checkpoint.source}: {name!r} is dense, but {packed[path]!r} is in 4 bits, and "
                "the layers of a stack are stored alike here: quantize the 16-bit checkpoint "
                "instead."
            )
        variable.set_value(jax.ShapeDtypeStruct((*value.stack_shape, *value.shape), dtype))


def matching(checkpoint: Checkpoint, family: Family, model: Any) -> dict[str, Slot]:
    """The tensors to read, in reading order, once every name and shape fits the model.

    Raises:
        ValueError: one does not.
    """
    source, tensors = checkpoint.source, checkpoint.tensors
    names = family.weight_names(model.config)
    read = [name for name in tensors if name in names]
    strange = [
        name
        for name in tensors
        if name not in names and not any(fnmatchcase(name, pattern) for pattern in family.ignored)
    ]
    if strange:
        raise ValueError(
            f"{source} holds the tensor {strange[0]!r} (and {len(strange) - 1} more) that a "
            "model with its config.json has no place for: check that both are of one checkpoint."
        )
    absent = [
        name
        for name in names
        if name not in tensors and not any(fnmatchcase(name, fresh) for fresh in family.fresh)
    ]
    if absent == [f"{family.output}.weight"]:
        raise ValueError(
            f"{source} has no {absent[0]!r}, and its config.json does not tie the head to the "
            "embedding: save it from the model with its head (AutoModelForCausalLM), not from the "
            "bare one (AutoModel)."
        )
    if absent:
        raise ValueError(
            f"{source} lacks the tensor {absent[0]!r} (and {len(absent) - 1} more) that its "
            "config.json calls for: check that both are of one checkpoint, and whole."
        )
    for name in read:
        value = node_at(model, names[name].path).get_value()
        info = tensors[name]
        quantized = isinstance(value, QuantizedTensor)
        if info.quant is not None and info.quant != checkpoint.quant:
            raise ValueError(
                f"{source}: {name!r} is stored as {info.quant}, but other weights as "
                f"{checkpoint.quant}: quantize the 16-bit checkpoint instead."
            )
        # Files keep the vocabulary dense, whatever becomes of it here.
        packed = quantized and not is_vocabulary(model, names[name])
        if packed and checkpoint.quant is not None and info.quant is None:
            raise ValueError(
                f"{source}: {name!r} has no quant_state, but other weights are quantized in 4 "
                "bits: fetch the whole checkpoint again."
            )
        if info.dtype not in DTYPES:
            raise ValueError(
                f"{source}: tensor {name!r} is stored as {info.dtype}, but weights of "
                f"{', '.join(DTYPES)} are read: take a 16- or 32-bit checkpoint."
            )
        stacked = 0 if quantized else len(names[name].stack_index)
        expected = value.shape[stacked:]
        if tuple(info.shape) != tuple(expected):
            raise ValueError(
                f"{source}: tensor {name!r} has shape {list(info.shape)}, but config.json calls "
                f"for {list(expected)}: check that both are of one checkpoint."
            )
    return {name: names[name] for name in read}


def ties(config: Mapping[str, Any]) -> bool:
    """Whether a config.json (which may leave it to its family) makes the head the embedding."""
    return getattr(family_of(config).read_config(config), "tie_word_embeddings", False)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the same model with a head of its own."""
    read = family_of(config).read_config(config)
    own = {**config, "tie_word_embeddings": False}
    if isinstance(read, EncoderDecoderConfig):
        # Which follows from the other one where the file does not say.
        own["scale_decoder_outputs"] = read.scale_decoder_outputs
    return own


def names_in(config: Mapping[str, Any]) -> dict[str, str]:
    """What a checkpoint calls the tensors that an adapter trained on it calls otherwise: a Gemma 3
    that sees is trained as the text model that it is read as."""
    family = family_of(config)
    read = family.read_config(config)
    trained_as = FAMILIES[read.model_type]
    if trained_as is family:
        return {}
    whole = dataclasses.replace(read, tie_word_embeddings=False)
    return dict(zip(trained_as.weight_names(whole), family.weight_names(whole), strict=True))


def is_vocabulary(model: nnx.Module, slot: Slot) -> bool:
    """Whether a tensor is an embedding or a head: rows for ids."""
    return isinstance(node_at(model, slot.path[:-1]), Embedding)


def node_at(model: nnx.Module, path: tuple[str, ...]) -> Any:
    """The Variable or module at a path of attribute names."""
    return functools.reduce(getattr, path, model)
