"""From a path to a `Checkpoint`: a Hugging Face folder, 16-bit or in 4 bits, or a GGUF file."""

import hashlib
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from qlora_jax.checkpoints.adapter_config import CONFIG
from qlora_jax.checkpoints.bitsandbytes import (
    check_method,
    is_part,
    packed_names,
    read_packed,
    read_state,
)
from qlora_jax.checkpoints.checkpoint import Checkpoint, TensorInfo, dense, dtype_name
from qlora_jax.checkpoints.folder import INDEX, NO_PICKLE, PICKLES, SINGLE, WeightFolder
from qlora_jax.checkpoints.gguf import open_gguf
from qlora_jax.checkpoints.matching import untied
from qlora_jax.data.json_file import read_json
from qlora_jax.models import FAMILIES, family_of
from qlora_jax.quant import QuantizedTensor

COMPANIONS = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Small files that belong to a model whatever its weights' format: they go where it goes."""
VOCABULARIES = frozenset({"tokenizer.json", "tokenizer.model", "spiece.model"})
"""Those of them that are a tokenizer, and not about one."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A model's weights, ready to be read: headers are read here, numbers are not (but of a head
    that lies beside the embedding it is tied to).

    Args:
        path: a Hugging Face folder with safetensors, a GGUF file, or a folder with one GGUF file
            (and, if it lies there, the config.json and tokenizer that are then taken).

    Raises:
        FileNotFoundError: there is no such path, or no weights there.
        ValueError: pickles, a damaged file, an index that points outside of its folder, or a
            format that is not read.
    """
    path = Path(path).expanduser()
    if path.is_file() and any(path.match(pattern) for pattern in PICKLES):
        raise ValueError(f"{path} is {NO_PICKLE}")
    if path.is_file():
        return open_gguf(path)
    has_weights = (path / INDEX).is_file() or (path / SINGLE).is_file()
    files = [] if has_weights else sorted(path.glob("*.gguf"))
    if not files:
        refuse_adapter(path)
        return _open_folder(path)
    if len(files) > 1:
        raise ValueError(
            f"{path} holds {len(files)} GGUF files, {files[0].name} and others: give one of them."
        )
    return _beside(path, open_gguf(files[0]))


def refuse_adapter(folder: Path) -> None:
    """FileNotFoundError for the folder of an adapter, or of a run, given as a model's."""
    adapter = next((p for p in (folder, folder / "adapter") if (p / CONFIG).is_file()), None)
    if adapter is not None and not ((folder / INDEX).is_file() or (folder / SINGLE).is_file()):
        raise FileNotFoundError(
            f"{folder} holds no model: {adapter} is an adapter, which goes with its base, a "
            "model's folder or name."
        )


def _beside(folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    """A GGUF file's checkpoint with what lies beside it in the place of what it says itself."""
    if (folder / "config.json").is_file():
        checkpoint = replace(checkpoint, config=read_json(folder / "config.json"))
    files = read_companions(folder)
    if VOCABULARIES & files.keys():
        checkpoint = replace(checkpoint, companions=lambda: files)
    return checkpoint


def _open_folder(folder: Path) -> Checkpoint:
    config = read_json(folder / "config.json")
    weights = WeightFolder(folder)
    check_method(config, weights)
    packed = packed_names(weights)
    tensors: dict[str, TensorInfo] = {}
    for name in weights:
        if name in packed:
            state = read_state(weights, name)
            tensors[name] = TensorInfo(state.shape, dtype_name(state.dtype), state.config)
        elif not (packed and is_part(name)):
            tensors[name] = TensorInfo(weights.shapes[name], weights.dtypes[name])

    def read(name: str) -> np.ndarray | QuantizedTensor:
        return read_packed(weights, name) if name in packed else weights.read(name)

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    checkpoint = Checkpoint(folder, plain, tensors, read, lambda: read_companions(folder))
    return _with_a_head_of_its_own(_under_a_head(checkpoint))


def _under_a_head(checkpoint: Checkpoint) -> Checkpoint:
    """The same with the names that its tensors have in a model with a head, if it was saved from
    one without (transformers' `LlamaModel`, `AutoModel`)."""
    family = FAMILIES.get(str(checkpoint.config.get("model_type")))
    if family is None or not family.root:
        return checkpoint
    if any(name.startswith(f"{family.root}.") for name in checkpoint.tensors):
        return checkpoint
    names = family.weight_names(family.read_config(checkpoint.config))

    def named(name: str) -> str:
        longer = f"{family.root}.{name}"
        known = longer in names or any(fnmatchcase(longer, pattern) for pattern in family.ignored)
        return longer if known else name

    stored = {named(name): name for name in checkpoint.tensors}
    return replace(
        checkpoint,
        tensors={name: checkpoint.tensors[old] for name, old in stored.items()},
        read=lambda name: checkpoint.read(stored[name]),
    )


def _with_a_head_of_its_own(checkpoint: Checkpoint) -> Checkpoint:
    """The same with a config.json that does not tie the head to the embedding, if it does and the
    head lies there with other numbers, which transformers 5 takes then. Only such a pair is read.
    """
    family = FAMILIES.get(str(checkpoint.config.get("model_type")))
    tied = checkpoint.config.get("tie_word_embeddings")
    if family is None or family.output is None or tied is False:
        return checkpoint
    head = f"{family.output}.weight"
    if head not in checkpoint.tensors:
        return checkpoint
    names = family_of(checkpoint.config).weight_names(family.read_config(checkpoint.config))
    tables = ("embed_tokens", "shared")
    embedding = next(name for name, slot in names.items() if slot.path[0] in tables)
    if head in names or embedding not in checkpoint.tensors:
        return checkpoint

    def digest(name: str) -> bytes:
        # One after the other: each may be a gigabyte.
        rows = np.ascontiguousarray(dense(checkpoint.read(name)))
        return hashlib.sha256(rows.view(np.uint8).data).digest()

    if digest(head) == digest(embedding):
        return checkpoint
    return replace(checkpoint, config=untied(checkpoint.config))


def read_companions(folder: Path) -> dict[str, bytes]:
    """The files of a folder that `COMPANIONS` names."""
    paths = sorted({path for pattern in COMPANIONS for path in folder.glob(pattern)})
    return {path.name: path.read_bytes() for path in paths}
