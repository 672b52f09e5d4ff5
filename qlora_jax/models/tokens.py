"""More tokens than the base knows: rows that are added to a model and trained while the rest of the
vocabulary stays frozen.

    tokenizer = add_tokens(model, tokenizer, ["<|im_start|>", "<|im_end|>"])

The frozen matrix grows where it has to, by the mean of its rows (as transformers does by default:
a new token is then as likely as an average one), and a small trained matrix holds the new rows
beside it. A tied head follows by itself, a head of its own gets trained rows too. Adapters save the
trained rows as PEFT's `trainable_token_indices` do.
"""

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import jax.numpy as jnp
from flax import nnx

from qlora_jax.data import Tokenizer
from qlora_jax.models.embedding import Embedding


def add_tokens(model: Any, tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """Adds special tokens to a model, in place, and to its tokenizer; their rows are trained.

    Args:
        model: its embedding, and its head where it has one of its own, get the rows.
        tokenizer: of the model.
        tokens: texts; one that the tokenizer has already is trained from the row it has.

    Returns:
        The tokenizer with the tokens (the one given is left as it is).

    Raises:
        ValueError: no token is given, or one is empty; the embedding is trained whole already.
        TypeError: `tokens` is one text.
    """
    if isinstance(tokens, str):
        raise TypeError(f"tokens is the text {tokens!r}, each letter a token: give [{tokens!r}].")
    if not tokens:
        raise ValueError("tokens is empty: name at least one token to add.")
    extended = tokenizer.with_tokens(tokens)
    ids = [_known(extended, token) for token in dict.fromkeys(tokens)]
    new = [id_ for id_ in ids if id_ >= tokenizer.vocab_size]
    for embedding in _growable(model).values():
        # Many models have rows to spare: those hold nothing, and count neither as old nor as new.
        mean = embedding.mean(tokenizer.vocab_size)
        embedding.grow(extended.vocab_size)
        if new:
            embedding.set_rows(jnp.asarray(new), mean)
    _update_config(model)
    train_tokens(model, ids)
    return extended


def _known(tokenizer: Tokenizer, token: str) -> int:
    id_ = tokenizer.token_id(token)
    assert id_ is not None
    return id_


def resize_token_embeddings(model: Any, size: int) -> None:
    """Grows the vocabulary of a model, in place: new rows are the mean of the old ones, frozen.

    Raises:
        ValueError: the vocabulary is larger than that already; rows to spare do no harm.
    """
    for name, embedding in _growable(model).items():
        rows = embedding.shape[0]
        if size < rows:
            raise ValueError(
                f"size is {size}, but {name} has {rows} rows, and rows are never taken away here: "
                f"give {rows} or more."
            )
        embedding.grow(size)
    _update_config(model)


def train_tokens(model: Any, ids: Sequence[int]) -> None:
    """Makes the rows of some tokens trainable, in place; rows that are trained already stay so.

    Args:
        model: its embedding, and its head where it has one of its own.
        ids: of tokens, any order.

    Raises:
        ValueError: no id, or one outside of the vocabulary; embeddings that are trained whole.
        TypeError: `ids` holds something else than whole numbers.
    """
    if not all(isinstance(id_, Integral) for id_ in ids):
        raise TypeError(
            f"ids is {ids!r}, but whole numbers are needed: tokenizer.token_id gives a token's."
        )
    if not ids:
        raise ValueError("ids is empty: name at least one token to train.")
    for name, embedding in _growable(model).items():
        rows = embedding.shape[0]
        if not all(0 <= id_ < rows for id_ in ids):
            wrong = next(id_ for id_ in ids if not 0 <= id_ < rows)
            raise ValueError(
                f"ids holds {wrong}, but {name} has {rows} rows: grow it first with "
                "resize_token_embeddings, or add tokens with add_tokens."
            )
        train_rows_of(embedding, ids)


def train_rows_of(embedding: Embedding, ids: Sequence[int]) -> None:
    """Adds tokens to the trained rows of one embedding, in place, from the rows they have now."""
    trained = embedding.token_ids
    before: list[int] = [] if trained is None else trained[...].tolist()
    every = jnp.asarray([*before, *(i for i in dict.fromkeys(ids) if i not in before)], jnp.int32)
    rows = embedding(every).astype(jnp.float32)
    if embedding.token_rows is not None:
        # Not through the base's dtype: trained rows keep every bit.
        rows = rows.at[: len(before)].set(embedding.token_rows[...])
    embedding.train_rows(every, rows)


def vocabularies(model: Any) -> dict[str, Embedding]:
    """The matrices of a model with a row for each token, by name: its embedding, and its head where
    that is another matrix. An encoder that only classifies has none that can grow."""
    return {
        name: child
        for name, child in vars(model).items()
        if isinstance(child, Embedding) and name != "embed_positions"
    }


def _growable(model: Any) -> dict[str, Embedding]:
    found = vocabularies(model)
    if not found:
        raise ValueError(
            f"A {type(model).__name__} takes no new tokens: add them to a model that writes text."
        )
    for embedding in found.values():
        if isinstance(embedding.weight, nnx.LoRAParam):
            raise ValueError(
                "The embedding is trained whole (modules_to_save), so its rows are trained "
                "already: leave it out of modules_to_save to train some rows alone."
            )
    return found


def _update_config(model: Any) -> None:
    size = next(iter(vocabularies(model).values())).shape[0]
    model.config = replace(model.config, vocab_size=size)
