"""What a model's weights are before anyone holds them: names, shapes, and a way to read one.

Everything that comes is a `Checkpoint` (a folder of safetensors, 16-bit or in bitsandbytes' 4-bit
format, a GGUF file, a model in memory), and everything that goes is written from one. What lies
between is a chain of functions from checkpoint to checkpoint, none of which reads a number:

    open_checkpoint(base) → quantized → dequantized → merged(adapter) → save_checkpoint(folder)

The numbers flow when the end of the chain asks for a tensor, one tensor at a time: no step ever
needs the whole model in memory. Names are Hugging Face's throughout; a 4-bit weight is one tensor
here, whose `read` gives a `QuantizedTensor`, however many tensors its file keeps it in.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qlora_jax.quant import QuantConfig, QuantizedTensor, quantize

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes of weights, by safetensors' names for them."""


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it.

    Attributes:
        shape: logical, of the numbers and not of their codes.
        dtype: safetensors' name ("BF16"); of a 4-bit weight, what it was before.
        quant: how it is quantized; None where it is dense.
    """

    shape: tuple[int, ...]
    dtype: str
    quant: QuantConfig | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights, to be read one by one.

    Attributes:
        source: the folder or file they come from; messages name it.
        config: config.json, without its quantization_config.
        tensors: what there is, by Hugging Face's names, in the order that reads fastest.
        read: name → NumPy array, or `QuantizedTensor` where `tensors[name].quant` is set.
        companions: the small files that belong to the model, by name, such as its tokenizer.
    """

    source: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], np.ndarray | QuantizedTensor]
    companions: Callable[[], dict[str, bytes]] = dict

    @property
    def quant(self) -> QuantConfig | None:
        """How its quantized weights are stored (the first speaks for all); None if none is."""
        return next((info.quant for info in self.tensors.values() if info.quant), None)


def check_checkpoint(name: str, value: Any) -> None:
    """TypeError for an argument of that name that is none, but its folder, say."""
    if not isinstance(value, Checkpoint):
        raise TypeError(
            f"{name} is {value!r}, but a Checkpoint is needed: give open_checkpoint(folder)."
        )


def dtype_name(dtype: Any) -> str:
    """safetensors' name of a float dtype, however it is given ("bfloat16", "BF16", jnp.bfloat16).

    Raises:
        ValueError: none of the dtypes that weights are stored in.
    """
    if isinstance(dtype, str) and dtype in DTYPES:
        return dtype
    try:
        given = jnp.dtype(dtype)
    except TypeError:
        given = None
    for name, known in DTYPES.items():
        if given == known:
            return name
    raise ValueError(f"dtype is {dtype!r}, but float32, float16 or bfloat16 is needed.")


def quantized(
    checkpoint: Checkpoint,
    names: frozenset[str] | set[str],
    quant: QuantConfig,
    *,
    dtype: Any = None,
    how: Callable[[str, np.ndarray], QuantizedTensor] | None = None,
) -> Checkpoint:
    """The same with some of its dense tensors quantized as they are read.

    Args:
        checkpoint: dense.
        names: which tensors; `linear_weights` gives those that `load_model` would quantize.
        quant: into what.
        dtype: what the quantized tensors dequantize to; None for what they were. They are
            quantized from the numbers they have, whatever this says.
        how: (name, tensor) → its codes; None for `quantize(tensor, quant)`.

    Raises:
        ValueError: it is quantized already.
    """
    if checkpoint.quant is not None:
        raise ValueError(
            f"{checkpoint.source} is quantized already, as {checkpoint.quant}: give the 16-bit "
            "checkpoint."
        )

    tensors = {
        name: TensorInfo(info.shape, dtype_name(dtype or info.dtype), quant)
        if name in names
        else info
        for name, info in checkpoint.tensors.items()
    }

    def read(name: str) -> np.ndarray | QuantizedTensor:
        value = checkpoint.read(name)
        if name not in names or isinstance(value, QuantizedTensor):
            return value
        packed = quantize(value, quant) if how is None else how(name, value)
        tensor = jax.tree.map(np.asarray, packed)
        tensor.dtype = DTYPES[tensors[name].dtype]
        return tensor

    return replace(checkpoint, tensors=tensors, read=read)


def dense(value: np.ndarray | QuantizedTensor, dtype: Any = jnp.float32) -> np.ndarray:
    """A tensor as it was read or, of codes, the numbers that they stand for, in this dtype."""
    if isinstance(value, QuantizedTensor):
        return np.asarray(jax.tree.map(jnp.asarray, value).dequantize(dtype))
    return value


def dequantized(
    checkpoint: Checkpoint, dtype: Any = None, *, names: Collection[str] | None = None
) -> Checkpoint:
    """The same with dense numbers in the place of quantized ones.

    Args:
        checkpoint: any; dense tensors stay as they are.
        dtype: of the dequantized tensors; None for what each was before.
        names: of the tensors to dequantize; None for all.
    """
    name_of = None if dtype is None else dtype_name(dtype)
    tensors = {
        name: TensorInfo(info.shape, name_of or info.dtype)
        if info.quant is not None and (names is None or name in names)
        else info
        for name, info in checkpoint.tensors.items()
    }

    def read(name: str) -> np.ndarray | QuantizedTensor:
        value, info = checkpoint.read(name), tensors[name]
        return value if info.quant is not None else dense(value, DTYPES[info.dtype])

    return replace(checkpoint, tensors=tensors, read=read)


def cast(checkpoint: Checkpoint, dtype: Any) -> Checkpoint:
    """The same with every dense tensor in one dtype; quantized ones stay as they are."""
    target = dtype_name(dtype)

    def read(name: str) -> np.ndarray | QuantizedTensor:
        value = checkpoint.read(name)
        return value if isinstance(value, QuantizedTensor) else value.astype(DTYPES[target])

    tensors = {
        name: info if info.quant else info._replace(dtype=target)
        for name, info in checkpoint.tensors.items()
    }
    # transformers 5 writes `dtype`, and reads the `torch_dtype` of transformers 4 as well.
    key = "dtype" if "dtype" in checkpoint.config else "torch_dtype"
    config = dict(checkpoint.config) | {key: DTYPES[target].name}
    return replace(checkpoint, config=config, tensors=tensors, read=read)
