"""Greedy generations of small models under transformers: every family, both architectures."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.checkpoints import load_model
from qlora_jax.generate import GenerationConfig, generate
from tests.shared import shared_path


def slow(*names):
    # Their programs differ little, and tests/vectors/test_models.py writes each one's text as well.
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def _programs_are_not_kept():
    yield
    jax.clear_caches()


def load(name):
    folder = shared_path(f"vectors/models/{name}")
    model = load_model(folder, quant=None, lora=None, compute_dtype=jnp.float32)
    return model, load_file(folder / "io.safetensors")


def eos_token_id(name):
    return json.loads(shared_path(f"vectors/models/{name}/config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize(
    "name",
    [
        "gemma2",
        "llama_ropescaled_tied",
        "opt",
        *slow("gemma3_text", "gpt_neox", "mistral_sw8", "mixtral", "phi3", "qwen2", "qwen3"),
    ],
)
def test_decoders(name):
    model, tensors = load(name)
    prompt = tensors["greedy_prompt"][0].tolist()
    expected = tensors["greedy_output"][0].tolist()
    steps = len(expected) - len(prompt)
    # The reference kept the end token out, so that every text has the full length.
    config = GenerationConfig(
        max_new_tokens=steps, min_new_tokens=steps, eos_token_ids=(eos_token_id(name),)
    )
    # Others beside it, so that padding on the left must not matter.
    found = generate(model, [prompt[:3], prompt, [*prompt, 5]], config, batch_size=3)
    assert [*prompt, *found[1].tokens] == expected


@pytest.mark.parametrize("name", ["t5_v1_1", *slow("t5_v1_0")])
def test_encoder_decoders(name):
    model, tensors = load(name)
    sources = [
        ids[mask].tolist()
        for ids, mask in zip(
            tensors["input_ids"], tensors["attention_mask"].astype(np.bool_), strict=True
        )
    ]
    assert len({len(source) for source in sources}) == 2, "unequal prompts"
    start, *_ = tensors["greedy_output"][0]
    steps = tensors["greedy_output"].shape[1] - 1
    config = GenerationConfig(
        max_new_tokens=steps, min_new_tokens=steps, eos_token_ids=(eos_token_id(name),)
    )
    found = generate(model, sources, config, batch_size=2)
    assert [[start, *g.tokens] for g in found] == tensors["greedy_output"].tolist()
