"""The tokenizer that came with a checkpoint, wherever its files are."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qlora_jax.checkpoints.checkpoint import Checkpoint
from qlora_jax.data import Tokenizer, load_tokenizer


def checkpoint_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a folder, or the one inside a GGUF file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or cuts texts by a rule that is not known here.
    """
    if checkpoint.source.is_dir():
        return load_tokenizer(checkpoint.source)
    config = {"config.json": json.dumps(dict(checkpoint.config)).encode()}
    tokenizer = tokenizer_from_files(checkpoint.companions() | config)
    return replace(tokenizer, name=checkpoint.source.stem)


def tokenizer_from_files(files: Mapping[str, bytes]) -> Tokenizer:
    """A tokenizer from its files' contents, by name. Raises as `load_tokenizer`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return load_tokenizer(folder)
