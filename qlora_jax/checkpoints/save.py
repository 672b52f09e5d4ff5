"""From a checkpoint, or a model in memory, to a Hugging Face folder.

Dense weights are written as they are, quantized ones in bitsandbytes' 4-bit format: a folder holds
what its checkpoint holds. What it should hold is said before, by `quantized`, `dequantized` and
`cast`. There is one exception: what transformers never reads in 4 bits (T5's `wo`) is written as
the numbers that its codes stand for.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from qlora_jax.checkpoints.bitsandbytes import QUANT_TYPES, packed_tensors, quantization_config
from qlora_jax.checkpoints.checkpoint import (
    DTYPES,
    Checkpoint,
    TensorInfo,
    cast,
    check_checkpoint,
    dtype_name,
)
from qlora_jax.checkpoints.dense_modules import skip_modules, with_kept_dense
from qlora_jax.checkpoints.folder import INDEX, SINGLE
from qlora_jax.checkpoints.matching import is_vocabulary, node_at
from qlora_jax.checkpoints.safetensors_writer import ShardedWriter, parse_size
from qlora_jax.data import Tokenizer
from qlora_jax.files import new_folder
from qlora_jax.models import FAMILIES
from qlora_jax.nn import TrainedParam
from qlora_jax.quant import QuantConfig, QuantizedTensor

MAX_SHARD_SIZE = "5GB"
_PARTS_PER_WEIGHT = 6
# What holds a model's weights in a folder: one file, or shards and their index.
_WEIGHTS = (SINGLE, "model-*-of-*.safetensors", INDEX)


def save_checkpoint(
    folder: str | Path, checkpoint: Checkpoint, *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Writes a new folder, reading and writing one tensor at a time.

    Args:
        folder: must not exist yet; it appears when it is complete.
        checkpoint: what is written, with its companions (tokenizer, ...).
        max_shard_size: bytes, or such as "2GB"; larger checkpoints become shards and an index.

    Raises:
        FileExistsError: the folder exists.
        ValueError: a quantization that bitsandbytes has no format for.
        TypeError: checkpoint is none, but its folder, say.
    """
    check_checkpoint("checkpoint", checkpoint)
    parse_size(max_shard_size)
    checkpoint = with_kept_dense(checkpoint)
    _refuse_unwritable(checkpoint)
    with new_folder(folder) as partial:
        _write(partial, checkpoint, max_shard_size)
        for name, content in checkpoint.companions().items():
            (partial / name).write_bytes(content)


def save_model(
    folder: str | Path,
    model: Any,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: Any = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Writes a model's base weights, for `load_model` and transformers: dense, or in 4 bits.

    Args:
        folder: made if missing; each file is put in place whole or not at all, the config last, and
            takes the place of a model's that was there.
        model: without adapters.
        tokenizer: written beside; without one, `load_pretrained` finds none in a new folder.
        dtype: of the dense weights in the file; None keeps each one's own.
        max_shard_size: as in `save_checkpoint`.

    Raises:
        ValueError: the model has adapters, which these files cannot hold, or a quantization that
            bitsandbytes has no format for.
        TypeError: the model is none of load_pretrained's.
    """
    checkpoint = model_checkpoint(model)
    if dtype is not None:
        checkpoint = cast(checkpoint, dtype)
    checkpoint = with_kept_dense(checkpoint)
    _refuse_unwritable(checkpoint)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=folder) as partial:
        _write(Path(partial), checkpoint, max_shard_size)
        written = sorted(Path(partial).iterdir(), key=lambda path: path.suffix == ".json")
        # What an earlier model of other shards left would be read beside, or instead of, this one.
        stale = {path.name for pattern in _WEIGHTS for path in folder.glob(pattern)}
        for path in written:
            path.replace(folder / path.name)
        for name in stale - {path.name for path in written}:
            (folder / name).unlink()
    if tokenizer is not None:
        tokenizer.save(folder)


def model_checkpoint(model: Any) -> Checkpoint:
    """A model in memory as a checkpoint: its base weights, by their Hugging Face names.

    No file format keeps the vocabulary as `embedding_bits` does: packed embeddings and heads are
    decoded as they are read, so what is written computes what the model computes.

    Raises:
        ValueError: the model has adapters: merge them, or save them with `save_adapter`.
        TypeError: the model is none of load_pretrained's.
    """
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise TypeError(
            f"model is a {type(model).__name__}, but only the models of load_pretrained have a "
            "format of Hugging Face's: save and restore nnx.state(model) of a module of your own "
            "with Orbax."
        )
    adapters = nnx.All(nnx.LoRAParam, nnx.Not(TrainedParam))
    if jax.tree.leaves(nnx.state(model, adapters)):
        raise ValueError(
            "The model has adapters, which a model's own files cannot hold: save them "
            "(ql.save_adapter), or merge them (ql.merge_lora(model))."
        )
    family = FAMILIES[model.config.model_type]
    slots = family.weight_names(model.config)
    tensors = {}
    for name, slot in slots.items():
        path = slot.path
        value = node_at(model, path).get_value()
        quant = None
        shape = value.shape
        if isinstance(value, QuantizedTensor) and not is_vocabulary(model, slot):
            quant = QuantConfig(value.quant_type, value.blocksize, value.double_quant)
        else:
            shape = shape[len(slot.stack_index) :]
        tensors[name] = TensorInfo(tuple(shape), dtype_name(value.dtype), quant)

    def read(name: str) -> np.ndarray | QuantizedTensor:
        slot = slots[name]
        value = node_at(model, slot.path).get_value()
        if isinstance(value, QuantizedTensor) and tensors[name].quant is None:
            return np.asarray(value.dequantize())
        return jax.tree.map(lambda x: np.asarray(x[slot.stack_index]), value)

    stored = {DTYPES[info.dtype].name for info in tensors.values()}
    config = family.write_config(model.config)
    config["torch_dtype"] = stored.pop() if len(stored) == 1 else "float32"
    return Checkpoint(Path("the model"), config, tensors, read)


def _refuse_unwritable(checkpoint: Checkpoint) -> None:
    """Before anything is written."""
    for name, info in checkpoint.tensors.items():
        if info.quant is not None and info.quant.quant_type not in QUANT_TYPES:
            raise ValueError(
                f"{name!r} is quantized as {info.quant.quant_type!r}, for which bitsandbytes has "
                f"no 4-bit format: quantize as {' or '.join(QUANT_TYPES)}, or dequantize."
            )


def _write(folder: Path, checkpoint: Checkpoint, max_shard_size: int | str) -> None:
    """config.json and the weights into a folder that is there."""
    # A 4-bit weight's parts have longer names than it, so each is counted as one of them.
    longest = ".quant_state.bitsandbytes__nf4"
    names = [
        part
        for name, info in checkpoint.tensors.items()
        for part in ([name + longest] * _PARTS_PER_WEIGHT if info.quant else [name])
    ]
    with ShardedWriter(folder, names, max_shard_size) as writer:
        for name in checkpoint.tensors:
            value = checkpoint.read(name)
            writer.add(
                packed_tensors(name, value) if isinstance(value, QuantizedTensor) else {name: value}
            )
    config = dict(checkpoint.config)
    if checkpoint.quant is not None:
        dtype = next(info.dtype for info in checkpoint.tensors.values() if info.quant)
        config["quantization_config"] = quantization_config(
            checkpoint.quant, DTYPES[dtype].name, skip_modules(checkpoint)
        )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
