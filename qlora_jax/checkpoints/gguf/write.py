"""A checkpoint as a GGUF file for llama.cpp: streamed, with its tokenizer."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.checkpoint import Checkpoint, dequantized
from qlora_jax.checkpoints.gguf import vocabulary
from qlora_jax.checkpoints.gguf.architecture import Architecture, by_model_type, swap_rows
from qlora_jax.checkpoints.gguf.hyperparameters import to_metadata
from qlora_jax.checkpoints.gguf.names import gguf_names, heads_of, is_offset, library
from qlora_jax.files import new_file
from qlora_jax.models import family_of

FILE_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q5_1": "MOSTLY_Q5_1",
    "Q5_0": "MOSTLY_Q5_0",
    "Q4_1": "MOSTLY_Q4_1",
    "Q4_0": "MOSTLY_Q4_0",
}
"""The data types that the gguf package can write → its name of a file of them."""

# With few bits for the layers, the vocabulary keeps more, as llama.cpp's own quantizer has it.
_NARROW = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
_CHUNK = 2**22


def save_gguf(
    path: str | Path,
    checkpoint: Checkpoint,
    file_type: str = "Q8_0",
    *,
    name: str | None = None,
    tokenizer: bool = True,
) -> None:
    """Writes a GGUF file, reading and writing one tensor at a time.

    Args:
        path: must not exist yet; it appears when it is complete.
        checkpoint: what is written; 4-bit weights are dequantized to float32 on the way.
        file_type: one of `FILE_TYPES`. Norms and biases are float32 always, rows that do not
            fill the type's blocks float16, and the vocabulary is Q8_0 where the layers have fewer
            bits.
        name: what the file calls the model; None for its source's name.
        tokenizer: whether the tokenizer goes in; llama.cpp needs one to read text.

    Raises:
        FileExistsError: there is such a file.
        ValueError: an unknown type, or an architecture, setting or tokenizer that llama.cpp does
            not have.
        ModuleNotFoundError: the gguf package is missing.
    """
    gguf = library()
    if file_type not in FILE_TYPES:
        hint = (
            " (the gguf package reads K-quants but does not write them: write F16 and use "
            "llama.cpp's `llama-quantize`)"
            if "_K" in file_type
            else ""
        )
        raise ValueError(
            f"The GGUF type is {file_type!r}; choose one of {', '.join(FILE_TYPES)}{hint}."
        )
    checkpoint = dequantized(checkpoint, jnp.float32)
    architecture = by_model_type(checkpoint.config)
    family = family_of(checkpoint.config)
    # Whole and in one style, whatever the file leaves out.
    config = family.write_config(family.read_config(checkpoint.config))
    metadata, computed = to_metadata(config)
    if tokenizer:
        words = vocabulary.from_files(checkpoint.companions(), config["vocab_size"])
        metadata |= vocabulary.to_metadata(words)
    names = _names(checkpoint, architecture, config)
    types = {
        name: _type_of(gguf, short, checkpoint.tensors[name].shape, file_type)
        for name, short in names.items()
    }
    with new_file(path) as partial:
        writer = gguf.GGUFWriter(partial, architecture.name)
        try:
            writer.add_name(name or checkpoint.source.stem)
            writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[file_type]])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for key, value in metadata.items():
                _add(gguf, writer, key, value)
            for short, tensor in computed.items():
                shape = tensor.shape
                writer.add_tensor_info(short, shape, tensor.dtype, tensor.nbytes)
            for tensor_name, short in names.items():
                _add_info(
                    gguf, writer, short, checkpoint.tensors[tensor_name].shape, types[tensor_name]
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in computed.values():
                writer.write_tensor_data(tensor)
            for tensor_name, short in names.items():
                weight = np.asarray(checkpoint.read(tensor_name))
                weight = _to_gguf(weight, short, architecture, config)
                writer.write_tensor_data(_quantize(gguf, weight, types[tensor_name]))
        finally:
            writer.close()


def _names(checkpoint: Checkpoint, architecture: Architecture, config: dict) -> dict[str, str]:
    """The tensors to write → their short names; of a tied head llama.cpp wants none."""
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    wanted = [
        name
        for name in checkpoint.tensors
        if name not in tied and not name.endswith("rotary_emb.inv_freq")
    ]
    return gguf_names(wanted, architecture, config["num_hidden_layers"])


def _type_of(gguf: Any, short: str, shape: tuple[int, ...], file_type: str) -> Any:
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if short in ("token_embd.weight", "output.weight") and file_type in _NARROW:
        file_type = "Q8_0"
    kind = gguf.GGMLQuantizationType[file_type]
    fits = shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
    return kind if fits else gguf.GGMLQuantizationType.F16


def _add_info(gguf: Any, writer: Any, short: str, shape: tuple[int, ...], kind: Any) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    nbytes = int(np.prod(shape)) // block * size
    # The library derives the shape from bytes where the dtype is uint8; here it is known.
    writer.add_tensor_info(short, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)


def _to_gguf(
    weight: np.ndarray, short: str, architecture: Architecture, config: dict
) -> np.ndarray:
    heads = heads_of(short, architecture, config)
    if heads is not None:
        weight = swap_rows(weight, heads, to_gguf=True)
    if is_offset(short, architecture):
        weight = weight.astype(np.float32) + np.float32(architecture.norm_offset)
    return weight


def _quantize(gguf: Any, weight: np.ndarray, kind: Any) -> np.ndarray:
    """A chunk of rows at a time, or the library's temporaries are several times the tensor."""
    if weight.ndim == 1:
        return gguf.quantize(weight.astype(np.float32), kind)
    rows = weight.reshape(-1, weight.shape[-1])
    step = max(1, _CHUNK // weight.shape[-1])
    return np.concatenate(
        [
            gguf.quantize(rows[start : start + step].astype(np.float32), kind)
            for start in range(0, len(rows), step)
        ]
    )


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    """One key, in the type that llama.cpp expects of such a value."""
    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    for python, kind in [
        (bool, kinds.BOOL),
        (int, kinds.UINT32),
        (float, kinds.FLOAT32),
        (str, kinds.STRING),
    ]:
        if isinstance(value, python):
            writer.add_key_value(key, value, kind)
            return
