"""Merging an adapter into its base: W' = W + s · B · A, with its eyes open about which W.

An adapter was trained beside *quantized* weights. Three bases can take it, and none is free:

- **original**: the 16-bit weights that were quantized. Closest to the base model, but training
  never saw them: the adapter also learned to mend the quantization's errors, which are not there.
- **dequantized**: the numbers that the codes stand for. What training saw, to 16-bit rounding.
- **requantized**: the merged dequantized weights, quantized again: four bits once more, and a
  delta smaller than half a step between codes is lost.

`merged` takes the base as a checkpoint and gives a checkpoint, so a merge is loaded, measured or
written like any other model, and one tensor is in memory at a time. docs/merging.md measures.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.adapter_config import read_adapter_config
from qlora_jax.checkpoints.adapter_deltas import AdapterFile
from qlora_jax.checkpoints.adapter_tokenizer import with_adapter_tokenizer
from qlora_jax.checkpoints.checkpoint import (
    DTYPES,
    Checkpoint,
    TensorInfo,
    check_checkpoint,
    dense,
    dtype_name,
    quantized,
)
from qlora_jax.checkpoints.matching import linear_weights
from qlora_jax.nn import LoraConfig, start_from_weight
from qlora_jax.quant import QuantConfig, QuantizedTensor, quantize

MODES = ("original", "dequantized", "requantized")
"""Which base takes the adapter."""


def merge(
    base: Checkpoint,
    adapter: str | Path,
    mode: str,
    *,
    quant: QuantConfig = QuantConfig(),
    dtype: Any = None,
) -> Checkpoint:
    """An adapter in its base, as a checkpoint to load or to write.

    Args:
        base: the base model; in 4 bits already, or as it was before.
        adapter: folder in PEFT's format.
        mode: one of `MODES`, as the module's prologue describes them.
        quant: how a 16-bit base was quantized in training.
        dtype: of the weights that are quantized or adapted, to which the sum is rounded once, or
            which 4-bit ones are said to have had; None for each one's own.

    Raises:
        FileNotFoundError: the adapter's files are missing.
        ValueError: an unknown mode, a 4-bit base where the original is needed, an adapter of
            another base, or LoftQ's of several rounds, which has mended an error that the original
            weights do not have.
        TypeError: base is no checkpoint, but its folder, say.
    """
    check_checkpoint("base", base)
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; choose one of {', '.join(MODES)}.")
    lora = read_adapter_config(adapter)
    if base.quant is not None and lora.changes_base:
        raise ValueError(
            f"{adapter} was trained on what its start, {lora.init_lora_weights!r}, left of the "
            f"16-bit weights, but {base.source} is quantized, as {base.quant}: give the 16-bit "
            "folder."
        )
    if base.quant is not None and mode == "original":
        raise ValueError(
            f"{base.source} is quantized, as {base.quant}, but the mode 'original' merges into "
            "the 16-bit weights: give their folder, or the mode 'dequantized'."
        )
    if mode == "original":
        return merged(_original(base, lora), adapter, dtype=dtype)
    packed = base if base.quant else _packed(base, lora, quant)
    if mode == "dequantized":
        return merged(packed, adapter, dtype=dtype)
    names = {name for name, info in packed.tensors.items() if info.quant}
    before = next(info.dtype for info in packed.tensors.values() if info.quant)
    wide = merged(packed, adapter, dtype=np.float32)
    return quantized(wide, names, packed.quant or quant, dtype=dtype or before)


def _packed(base: Checkpoint, lora: LoraConfig, quant: QuantConfig) -> Checkpoint:
    """The quantized base that training saw: of an adapter whose start took from it, what was left.

    That start is computed again, as it is where such an adapter is loaded.
    """

    def what_was_left(name: str, weight: np.ndarray) -> QuantizedTensor:
        own = lora.at(name.removesuffix(".weight"))
        if own is None:
            return quantize(weight, quant)
        left, _, _ = start_from_weight(jnp.asarray(weight), quant, own)
        assert isinstance(left, QuantizedTensor)
        return left

    how = what_was_left if lora.changes_base else None
    return quantized(base, linear_weights(base), quant, how=how)


def _original(base: Checkpoint, lora: LoraConfig) -> Checkpoint:
    """The 16-bit base, less what the adapter's start took from it."""
    if not lora.changes_base:
        return base
    if lora.init_lora_weights == "loftq":
        raise ValueError(
            f"The adapter started from what quantization lost (LoftQ, {lora.loftq_iter} rounds), "
            "which the original weights still have: merge with the mode 'dequantized'."
        )
    names = linear_weights(base)

    def read(name: str) -> np.ndarray | QuantizedTensor:
        weight = base.read(name)
        own = lora.at(name.removesuffix(".weight")) if name in names else None
        if own is None:
            return weight
        return np.asarray(start_from_weight(jnp.asarray(weight), None, own)[0])

    return replace(base, read=read)


def merged(checkpoint: Checkpoint, adapter: str | Path, *, dtype: Any = None) -> Checkpoint:
    """The checkpoint, dense, with an adapter added to its weights as they are read.

    The sum is taken in float32 and rounded once. Quantized weights that the adapter leaves alone
    are dequantized. A tokenizer beside an adapter that has trained rows, or modules whole, takes
    the place of the base's: it has the tokens that were added.

    Args:
        checkpoint: the base.
        adapter: folder in PEFT's format.
        dtype: of the weights that are quantized or adapted; None for each one's own.

    Raises:
        FileNotFoundError: the adapter's files are missing.
        ValueError: the adapter belongs to another base, or holds what cannot be merged.
        TypeError: checkpoint is none, but its folder, say.
    """
    check_checkpoint("checkpoint", checkpoint)
    file = AdapterFile(adapter, checkpoint)
    if file.grown or file.replaced:
        # Of tokens that were added.
        checkpoint = with_adapter_tokenizer(checkpoint, adapter)
    tensors = {
        name: TensorInfo(
            file.grown.get(name) or file.replaced.get(name, info.shape),
            info.dtype
            if dtype is None or (info.quant is None and name not in file.adapted)
            else dtype_name(dtype),
        )
        for name, info in (file.added | dict(checkpoint.tensors)).items()
    }

    def read(name: str) -> np.ndarray:
        target = DTYPES[tensors[name].dtype]
        value = file.replacement(name) if name in file.replaced else dense(checkpoint.read(name))
        if name in file.grown:
            value = file.grow(name, value.astype(np.float32))
        if name in file.adapted:
            value = file.merge(name, value.astype(np.float32))
        return value.astype(target)

    return replace(checkpoint, config=file.config, tensors=tensors, read=read)
