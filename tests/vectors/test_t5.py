"""T5 v1.0 (ReLU, tied and scaled head) and v1.1 (gated GELU) under transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.checkpoints import load_model
from qlora_jax.generate import GenerationConfig, generate
from qlora_jax.models.families.t5 import read_config, write_config
from tests.shared import shared_path


@pytest.fixture(scope="module", params=["t5_v1_0", "t5_v1_1"])
def case(request):
    folder = shared_path(f"vectors/models/{request.param}")
    model = load_model(folder, quant=None, lora=None, compute_dtype=jnp.float32)
    tensors = load_file(folder / "io.safetensors")
    return folder, model, {name: np.asarray(x) for name, x in tensors.items()}


def ids(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array.astype(np.int32))


def relative_error(actual, expected) -> float:
    return float(np.abs(np.asarray(actual) - expected).max() / np.ptp(expected))


def test_logits(case):
    _, model, io = case
    arguments = [ids(io[n]) for n in ("input_ids", "decoder_input_ids", "attention_mask")]
    assert not io["attention_mask"].all(), "the second source is padded"
    found = jax.jit(lambda model, *given: model(*given))(model, *arguments)
    # 8e-7 (v1.0) and 1.3e-6 (v1.1) seen: float32 rounding.
    assert relative_error(found, io["logits"]) < 3e-6


def test_logits_word_by_word_with_padding_on_either_side(case):
    _, model, io = case
    step = jax.jit(lambda model, tokens, cache: model.decode_step(tokens, cache))
    prefill = jax.jit(lambda model, *given: model.prefill(*given, cache_length=12))
    words = ids(io["decoder_input_ids"])
    for roll in (False, True):
        source, mask = io["input_ids"], io["attention_mask"]
        if roll:  # the padding of the second row goes to the left
            source, mask = (np.stack([x[0], np.roll(x[1], 5)]) for x in (source, mask))
        logits, cache = prefill(model, ids(source), ids(mask))
        for position in range(words.shape[1]):
            assert relative_error(logits, io["logits"][:, position]) < 1e-5  # 2.8e-6 seen
            if position + 1 < words.shape[1]:
                logits, cache = step(model, words[:, position + 1], cache)


def test_greedy_outputs(case):
    _, model, io = case
    rows = zip(io["input_ids"], io["attention_mask"].astype(bool), strict=True)
    sources = [row[mask].tolist() for row, mask in rows]
    written = generate(
        model, sources, GenerationConfig(max_new_tokens=10, eos_token_ids=(1,)), batch_size=2
    )
    for expected, found in zip(io["greedy_output"], written, strict=True):
        assert expected[0] == model.config.decoder_start_token_id
        assert list(found.tokens) == expected[1:].tolist()


def test_configs_of_transformers_4_and_5_read_alike(case):
    folder = case[0]
    new, old = (
        read_config(json.loads((folder / file).read_text()))
        for file in ("config.json", "config_legacy.json")
    )
    assert new == old
    assert read_config(write_config(new)) == new
