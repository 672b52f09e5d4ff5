"""Tokens that are added to a model: their rows are trained, saved and read, and nothing else is."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import qlora_jax as ql
from qlora_jax.checkpoints import load_adapter, save_adapter
from qlora_jax.checkpoints.adapter_file import TOKENS, token_indices
from qlora_jax.data import IGNORE, Batch, load_tokenizer
from qlora_jax.models import Decoder, train_rows_of
from qlora_jax.models.embedding import Embedding
from qlora_jax.train import TrainConfig, fit
from tests.checkpoints.tiny import CONFIG
from tests.random_decoder import random_decoder

LORA = ql.LoraConfig(r=2, alpha=4, target_modules=("q_proj",))
WORDS = [*"abcdefghijklmnopqrst", "<s>", "</s>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """22 words, of a model with 24 rows."""
    folder = tmp_path_factory.mktemp("tokenizer")
    spec = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: index for index, word in enumerate(WORDS)},
            "unk_token": "a",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
    )
    return load_tokenizer(folder)


def model(*, tied: bool = False, embedding_bits: int | None = None) -> Decoder:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied, num_hidden_layers=1)
    return random_decoder(config, lora=LORA, embedding_bits=embedding_bits)


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_and_the_vocabulary_grows(tied: bool, tokenizer) -> None:
    added = model(tied=tied)
    before = np.asarray(added.embed_tokens.weight[...])
    extended = ql.add_tokens(added, tokenizer, ["<|x|>", "<|y|>", "<|z|>", "c"])
    assert extended.encode("<|y|>", bos=False, special=True) == [23]
    assert (extended.vocab_size, added.config.vocab_size, tokenizer.vocab_size) == (25, 25, 22)
    np.testing.assert_array_equal(added.embed_tokens.token_ids[...], [22, 23, 24, 2])
    mean = before[:22].mean(0)
    rows = added.embed_tokens(jnp.asarray([22, 23, 24, 2, 3]))
    np.testing.assert_allclose(rows[:3], [mean] * 3, atol=1e-7)
    np.testing.assert_array_equal(rows[3:], before[[2, 3]])
    assert (added.lm_head is None) is tied
    assert added(jnp.asarray([[1, 24]])).shape == (1, 2, 25)


def test_only_the_rows_are_trained_and_the_head_follows(tokenizer, tmp_path) -> None:
    added = model(tied=True)
    ql.add_tokens(added, tokenizer, ["<|x|>", "c"])
    save_adapter(tmp_path, added, LORA, "base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["ensure_weight_tying"]
    graphdef, lora, rest = nnx.split(added, nnx.LoRAParam, ...)
    assert set(lora["embed_tokens"]) == {"token_rows"}
    ids = jnp.asarray([[1, 22, 5, 2]])

    def loss(lora, rest):
        return jnp.sum(nnx.merge(graphdef, lora, rest)(ids) ** 2)

    # The same as differentiating a whole matrix, at these rows.
    whole = model(tied=True)
    matrix = jnp.concatenate([added.embed_tokens(jnp.arange(24))])
    whole.embed_tokens.weight = nnx.Param(matrix)
    wdef, wparam, wrest = nnx.split(whole, nnx.PathContains("embed_tokens"), ...)
    dwhole = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(wdef, p, wrest)(ids) ** 2)))(wparam)
    drows = jax.jit(jax.grad(loss))(lora, rest)["embed_tokens"]["token_rows"].get_value()
    expected = dwhole["embed_tokens"]["weight"].get_value()[jnp.asarray([22, 2])]
    np.testing.assert_allclose(drows, expected, rtol=1e-4, atol=1e-5)


def test_saved_and_read_with_the_adapter(tokenizer, tmp_path) -> None:
    added = model()
    extended = ql.add_tokens(added, tokenizer, ["<|x|>", "<|y|>", "<|z|>"])
    for matrix in (added.embed_tokens, added.lm_head):
        matrix.token_rows[...] = matrix.token_rows[...] + jnp.asarray([[0.5], [0.25], [1]])
    save_adapter(tmp_path, added, LORA, "base", tokenizer=extended)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {
        "model.embed_tokens": [22, 23, 24],
        "lm_head": [22, 23, 24],
    }
    fresh = model()
    load_adapter(tmp_path, fresh)
    ids = jnp.asarray([[1, 24, 22, 3]])
    np.testing.assert_array_equal(fresh(ids), added(ids))
    # Whatever the order in which a model trains them already.
    other = model()
    ql.resize_token_embeddings(other, 25)
    ql.train_tokens(other, [24, 22])
    load_adapter(tmp_path, other)
    np.testing.assert_array_equal(other.embed_tokens(ids), added.embed_tokens(ids))
    again = load_tokenizer(tmp_path)
    assert again.encode("a <|z|> b", special=True) == extended.encode("a <|z|> b", special=True)
    assert again.eos_token_id == 21
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    save_file(tensors | {name: tensors[name][:, :-1].copy()}, weights)
    with pytest.raises(ValueError, match=r"of 'lm_head' are of shape \[3, 31\], but \[3, 32\] is"):
        load_adapter(tmp_path, model())


def test_rows_are_named_by_an_end_of_their_modules_name() -> None:
    """At a dot; what no tensor is there for stays as the file has it."""
    names = [f"base_model.model.{name}.{TOKENS}" for name in ("model.embed_tokens", "lm_head")]
    found = token_indices({"trainable_token_indices": {"embed_tokens": [5], "head": [6]}}, names)
    assert found == {"model.embed_tokens": (5,), "head": (6,)}
    assert token_indices({"trainable_token_indices": [7]}, names[:1]) == {
        "model.embed_tokens": (7,)
    }


def test_rows_that_are_trained_already_keep_every_bit() -> None:
    """Also where the matrix has fewer; a token that is named twice has one row."""
    matrix = Embedding(8, 32, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    exact = np.asarray(matrix.weight[...], np.float64)[:5].mean(0)
    np.testing.assert_allclose(matrix.mean(5), exact, rtol=1e-5, atol=1e-8)
    train_rows_of(matrix, [1])
    moved = matrix.token_rows[...] + 1e-5
    matrix.token_rows[...] = moved
    train_rows_of(matrix, [5, 1, 5])
    np.testing.assert_array_equal(matrix.token_ids[...], [1, 5])
    np.testing.assert_array_equal(matrix.token_rows[...][:1], moved)
    assert np.isnan(matrix(jnp.asarray([8]))).all()


def test_as_many_rows_as_there_are_is_no_change() -> None:
    same = model()
    ql.resize_token_embeddings(same, 24)
    assert same.config.vocab_size == 24


class Rows:
    """The same short row in every step, with the added token in it."""

    def at(self, step: int) -> Batch:
        ids = np.asarray([[1, 22, 5, 22, 7, 22]], np.int32)
        labels = np.where(np.arange(6) == 0, IGNORE, ids).astype(np.int32)
        return Batch(ids, labels, np.ones(ids.shape, bool))


class StopAfter:
    """Breaks a run off behind a step, as a killed process does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def start(self, step: int) -> None:
        """Nothing."""

    def log(self, step: int, values) -> None:
        if step > self.step:
            raise KeyboardInterrupt

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@pytest.mark.parametrize("bits", [None, pytest.param(8, marks=pytest.mark.slow)])
def test_fit_trains_checkpoints_and_resumes_the_rows(bits, tokenizer, tmp_path) -> None:
    """A run that was broken off ends as one that was not; only trained rows have moved. Packed or
    not, the frozen matrix stays as it is."""
    config = TrainConfig(
        steps=4, micro_batch_size=1, learning_rate=0.05, weight_decay=0.1, save_every=2,
        page_min_size=0,
    )  # fmt: skip

    def run(folder, callbacks=()):
        added = model(tied=True, embedding_bits=bits)
        ql.add_tokens(added, tokenizer, ["<|x|>"])
        frozen = jax.tree.map(np.asarray, added.embed_tokens.weight.get_value())
        fit(added, Rows(), config, run_folder=folder, callbacks=callbacks)
        jax.tree.map(np.testing.assert_array_equal, added.embed_tokens.weight.get_value(), frozen)
        rows = np.asarray(added.embed_tokens.token_rows[...])
        assert np.abs(rows - added.embed_tokens.mean(22)).max() > 0.05
        return rows

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "pieces", [StopAfter(2)])
    np.testing.assert_array_equal(run(tmp_path / "pieces"), whole)


def test_optax_and_paged_take_the_rows(tokenizer) -> None:
    added = model()
    ql.add_tokens(added, tokenizer, ["<|x|>"])
    _, lora, _ = nnx.split(added, nnx.LoRAParam, ...)
    tx = ql.paged(optax.adamw(1e-3), min_size=0)
    updates, _ = jax.jit(tx.update)(lora, tx.init(lora), lora)
    assert jax.tree.structure(updates) == jax.tree.structure(lora)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, t: ql.add_tokens(m, t, "<x>"), r"tokens is the text '<x>'.*give \['<x>'\]"),
        (lambda m, t: ql.train_tokens(m, ["<x>"]), "tokenizer.token_id gives"),
        (lambda m, t: ql.train_tokens(m, [1.5]), "whole numbers are needed"),
        (lambda m, t: ql.add_tokens(m, t, []), "tokens is empty"),
        (lambda m, t: ql.add_tokens(m, t, [""]), "at least a character"),
        (lambda m, t: ql.train_tokens(m, []), "ids is empty"),
        (lambda m, t: ql.train_tokens(m, [24]), "holds 24, but embed_tokens has 24 rows"),
        (lambda m, t: ql.resize_token_embeddings(m, 23), "rows are never taken away"),
    ],
)
def test_bad_input(call, words: str, tokenizer) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call(model(), tokenizer)
