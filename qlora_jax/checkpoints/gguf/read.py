"""A GGUF file as a checkpoint: dequantized tensor by tensor, under Hugging Face's names."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qlora_jax.checkpoints.checkpoint import DTYPES, Checkpoint, TensorInfo
from qlora_jax.checkpoints.gguf.architecture import by_metadata, swap_rows
from qlora_jax.checkpoints.gguf.hyperparameters import to_config
from qlora_jax.checkpoints.gguf.names import gguf_names, heads_of, is_offset, library
from qlora_jax.checkpoints.gguf.rope import ROPE_FACTORS
from qlora_jax.checkpoints.gguf.vocabulary import from_metadata, tokenizer_files
from qlora_jax.models import family_of

_MAGIC = b"GGUF"
# Dequantized at once; the library's temporaries are several times as large.
_CHUNK = 2**22


class StoredTensor(NamedTuple):
    """Where a GGUF tensor's bytes lie."""

    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUFFile:
    """A file's metadata, and its tensors by GGUF's names.

    Attributes:
        path: where it lies.
        metadata: keys → Python values.
        tensors: what there is, in the file's order.
    """

    def __init__(self, path: Path) -> None:
        """Reads everything but the tensors' numbers.

        Raises:
            ValueError: no GGUF file, or one that is cut off.
            ModuleNotFoundError: the gguf package is missing.
        """
        # What is cut off within the magic number is refused as truncated, below.
        with path.open("rb") as file:
            if not _MAGIC.startswith(file.read(len(_MAGIC))):
                raise ValueError(
                    f"{path} is no GGUF file: give one, or, of a checkpoint in safetensors, the "
                    "folder that holds it."
                )
        gguf = library()
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self.metadata = {key: field.contents() for key, field in reader.fields.items()}
            self.tensors = {
                tensor.name: StoredTensor(
                    tensor.tensor_type,
                    tuple(int(size) for size in reversed(tensor.shape)),
                    int(tensor.data_offset),
                    int(tensor.n_bytes),
                )
                for tensor in reader.tensors
            }
        # The library reads past the end of what is not there, and fails as chance will have it.
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(
                f"{path} is truncated or damaged ({error}): fetch it again."
            ) from error
        end = max((t.offset + t.nbytes for t in self.tensors.values()), default=0)
        if end > path.stat().st_size:
            raise ValueError(
                f"{path} is truncated: it has {path.stat().st_size:,} bytes, but its tensors end "
                f"at {end:,}; fetch it again."
            )

    def read(self, name: str) -> np.ndarray:
        """A tensor's numbers: as stored where that is a float dtype, else float32."""
        gguf = library()
        kind, shape, offset, nbytes = self.tensors[name]
        stored = np.fromfile(self.path, np.uint8, nbytes, offset=offset)
        plain = _plain_dtype(kind)
        if plain is not None:
            return stored.view(DTYPES[plain]).reshape(shape)
        return _dequantize(gguf, stored, kind, shape)


def _plain_dtype(kind: Any) -> str | None:
    return kind.name if kind.name in DTYPES else None


def _dequantize(gguf: Any, stored: np.ndarray, kind: Any, shape: tuple[int, ...]) -> np.ndarray:
    rows = stored.reshape(int(np.prod(shape[:-1])), -1)
    numbers = np.empty((rows.shape[0], shape[-1]), np.float32)
    step = max(1, _CHUNK // shape[-1])
    for start in range(0, rows.shape[0], step):
        numbers[start : start + step] = gguf.dequantize(rows[start : start + step], kind)
    return numbers.reshape(shape)


def open_gguf(path: str | Path) -> Checkpoint:
    """A GGUF file as a checkpoint.

    Args:
        path: the file. Of a split one, join the parts first (`llama-gguf-split --merge`).

    Raises:
        ValueError: a damaged file, an architecture or a data type that is not read.
        ModuleNotFoundError: the gguf package is missing.
    """
    path = Path(path)
    file = GGUFFile(path)
    if file.metadata.get("split.count", 0) > 1:
        raise ValueError(
            f"{path} is one of {file.metadata['split.count']} parts: join them first, with "
            "llama.cpp's `llama-gguf-split --merge`."
        )
    architecture = by_metadata(file.metadata)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    factors = file.read(ROPE_FACTORS) if ROPE_FACTORS in shapes else None
    config = to_config(file.metadata, shapes, factors)
    family = family_of(config)
    wanted = family.weight_names(family.read_config(config))
    names = gguf_names(wanted, architecture, config["num_hidden_layers"])
    back = {short: name for name, short in names.items()}
    tensors, sources = {}, {}
    for short, tensor in file.tensors.items():
        if short == ROPE_FACTORS:
            continue
        _refuse_unreadable(path, short, tensor)
        # What the architecture does not know keeps its name, and `load_model` says so.
        name = back.get(short, short)
        tensors[name] = TensorInfo(tensor.shape, _plain_dtype(tensor.kind) or "F32")
        sources[name] = short
    stored = {DTYPES[info.dtype].name for info in tensors.values() if len(info.shape) > 1}
    config["torch_dtype"] = stored.pop() if len(stored) == 1 else "float32"

    def read(name: str) -> np.ndarray:
        short = sources[name]
        weight = file.read(short)
        heads = heads_of(short, architecture, config)
        if heads is not None:
            weight = swap_rows(weight, heads, to_gguf=False)
        if is_offset(short, architecture):
            weight = weight - weight.dtype.type(architecture.norm_offset)
        return weight

    return Checkpoint(
        path, config, tensors, read, lambda: tokenizer_files(from_metadata(file.metadata))
    )


def _refuse_unreadable(path: Path, name: str, tensor: StoredTensor) -> None:
    gguf = library()
    if _plain_dtype(tensor.kind) is not None:
        return
    block = np.zeros((1, gguf.GGML_QUANT_SIZES[tensor.kind][1]), np.uint8)
    try:
        gguf.dequantize(block, tensor.kind)
    except NotImplementedError as error:
        raise ValueError(
            f"{path}: {name!r} is stored as {tensor.kind.name}, which the gguf package cannot "
            "read: take a file in another data type."
        ) from error
