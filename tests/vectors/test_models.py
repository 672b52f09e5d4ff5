"""Small models under transformers: logits padded on either side, and greedy text, one row a family.

Seen on a Xeon (jax 0.10.2): between 1.1e-7 (gemma3_text) and 4.7e-7 (phi3) of the logits' range.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.checkpoints import load_model
from qlora_jax.models import Decoder, family_of
from tests.shared import shared_path
from tests.vectors.qlora_run import logits

DECODERS = [
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "llama_ropescaled_tied",
    "mistral_sw8",
    "mixtral",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
]


@pytest.mark.parametrize("name", DECODERS)
def test_configs_of_transformers_4_and_5_read_alike_and_round_trip(name):
    folder = shared_path(f"vectors/models/{name}")
    new, old = (
        json.loads((folder / file).read_text()) for file in ("config.json", "config_legacy.json")
    )
    family = family_of(new)
    config = family.read_config(new)
    assert family.read_config(old) == config
    assert family.read_config(json.loads(json.dumps(family.write_config(config)))) == config


@functools.cache
def model_and_tensors(name: str) -> tuple[Decoder, dict[str, np.ndarray]]:
    folder = shared_path(f"vectors/models/{name}")
    model = load_model(folder, quant=None, lora=None, compute_dtype=jnp.float32)
    return model, load_file(folder / "io.safetensors")


@pytest.mark.parametrize("name", DECODERS)
def test_logits_right_and_left_padded(name):
    model, tensors = model_and_tensors(name)
    for prefix in ("", "leftpad_"):
        ids, mask = (
            jnp.asarray(tensors[f"{prefix}{key}"].astype(np.int32))
            for key in ("input_ids", "attention_mask")
        )
        assert prefix == "" or not mask[0, 0], "the padding is on the left"
        expected = tensors[f"{prefix}logits"]
        real = np.asarray(mask, bool)
        error = np.abs(np.asarray(logits(model, ids, mask)) - expected)[real].max()
        # One part in a million of the logits' range: float32 rounding.
        assert error < 1e-6 * np.ptp(expected[real]), error / np.ptp(expected[real])


@pytest.mark.parametrize(
    "name",
    [
        # tests/models/test_cache.py covers the mechanism; here is one family of each kind of
        # position, and the others when there is time.
        name if name in ("gemma3_text", "opt") else pytest.param(name, marks=pytest.mark.slow)
        for name in DECODERS
    ],
)
def test_greedy_text_through_the_cache(name):
    model, tensors = model_and_tensors(name)
    prompt, expected = (tensors[f"greedy_{key}"].astype(np.int32) for key in ("prompt", "output"))
    # The reference kept the end token out, so that every text has the full length.
    config = json.loads((shared_path(f"vectors/models/{name}") / "config.json").read_text())
    prefill = jax.jit(Decoder.prefill, static_argnames="cache_length")
    decode_step = jax.jit(Decoder.decode_step, donate_argnames="cache")
    scores, cache = prefill(model, jnp.asarray(prompt), cache_length=expected.shape[1])
    text = prompt[0].tolist()
    while len(text) < expected.shape[1]:
        text.append(int(scores[0].at[config["eos_token_id"]].set(-jnp.inf).argmax()))
        scores, cache = decode_step(model, jnp.asarray(text[-1:], jnp.int32), cache)
    assert text == expected[0].tolist()
