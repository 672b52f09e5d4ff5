"""The tokenizer beside an adapter: the base's, with the tokens that were added in training."""

import json
from dataclasses import replace
from pathlib import Path

from qlora_jax.checkpoints.checkpoint import Checkpoint
from qlora_jax.checkpoints.open import VOCABULARIES, read_companions
from qlora_jax.checkpoints.tokenizer import checkpoint_tokenizer, tokenizer_from_files
from qlora_jax.data import Tokenizer

# What of a model's small files says nothing of its tokens.
_OTHER = ("generation_config.json", "chat_template.jinja", "chat_template.json")


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a tokenizer lies in an adapter's folder."""
    return any((Path(folder) / name).is_file() for name in VOCABULARIES)


def adapter_tokenizer(folder: str | Path, base: Checkpoint) -> Tokenizer:
    """The tokenizer that lies in an adapter's folder, or its base's where none does.

    Raises:
        FileNotFoundError: there is none in either.
        ValueError: it is damaged, or cuts texts by a rule that is not known here.
    """
    if not has_tokenizer(folder):
        return checkpoint_tokenizer(base)
    own = read_companions(Path(folder))
    config = {"config.json": json.dumps(dict(base.config)).encode()}
    return replace(tokenizer_from_files(own | config), name=Path(folder).name)


def with_adapter_tokenizer(base: Checkpoint, folder: str | Path) -> Checkpoint:
    """The same with the tokenizer that lies in an adapter's folder, if one does."""
    if not has_tokenizer(folder):
        return base
    own = read_companions(Path(folder))

    def companions() -> dict[str, bytes]:
        kept = {name: file for name, file in base.companions().items() if name in _OTHER}
        return kept | own

    return replace(base, companions=companions)
