"""Where weights stream, every program that reads the model asks XLA to overlap their copies."""

import numpy as np
import pytest

from qlora_jax.data import Batch, load_tokenizer
from qlora_jax.evaluate import Harness, Question, examine, perplexity
from qlora_jax.models import streaming
from tests.random_decoder import ONE_LAYER, random_decoder
from tests.shared import shared_path


@pytest.fixture
def model():
    return random_decoder(ONE_LAYER)


def _perplexity(model, tokenizer):
    ids = np.ones((1, 8), np.int32)
    perplexity(model, [Batch(ids, ids, np.ones_like(ids, bool))])


def _examine(model, tokenizer):
    asked = {"virology": [Question("virology", "Why?", ("a", "b", "c", "d"), "A")]}
    examine(model, tokenizer, asked, {}, shots=0, max_len=64, batch_size=1)


def _harness(model, tokenizer):
    Harness(model, tokenizer, max_len=64, batch_size=1).loglikelihood([("One", " day")])


@pytest.mark.parametrize("program", [_perplexity, _examine, _harness])
def test_options_reach_the_compiler(program, model, monkeypatch):
    tokenizer = load_tokenizer(shared_path("data/models/stories260K"))
    # No compiler knows it, so the one that is told says its name.
    monkeypatch.setattr(streaming, "compiler_options", lambda platform: {"xla_overlap": True})
    program(model, tokenizer)
    model.stream_weights = True
    with pytest.raises(Exception, match="xla_overlap"):
        program(model, tokenizer)
