"""Architectures of GGUF files whose models are not in ../shared: there and back, and refused.

That llama.cpp itself computes the same is in tests/peers/test_llama_cpp.py.
"""

import dataclasses

import numpy as np
import pytest

from qlora_jax.checkpoints import open_checkpoint, open_gguf, save_gguf, save_model
from qlora_jax.checkpoints.gguf.hyperparameters import to_config, to_metadata
from qlora_jax.models import FAMILIES, DecoderConfig, RopeConfig
from tests.models.variants import VARIANTS
from tests.random_decoder import random_decoder

_OWN_HEAD = {"tie_word_embeddings": False}
_UNBIASED = {"qkv_bias": False, "o_bias": False, "mlp_bias": False}
_EVERY_FOURTH = (True, True, True, False) * 2
_WINDOWS = ("sliding_attention",) * 3 + ("full_attention",)
_YARN = RopeConfig(rope_theta=3e5, rope_type="yarn", factor=8.0, original_max_position_embeddings=8)
_LLAMA_3 = RopeConfig(rope_type="llama3", factor=8.0, original_max_position_embeddings=8)


def variant(name: str, **changes: object) -> DecoderConfig:
    return dataclasses.replace(VARIANTS[name], **changes)


SOME = {
    "gemma": variant("gemma-first"),
    "granite": variant("granite-scaled"),
    "granite-biased": variant("granite-scaled", qkv_bias=True, o_bias=True, mlp_bias=True),
    "smollm3": variant(
        "smollm3-still", num_hidden_layers=8, rope_layers=_EVERY_FOURTH, **_UNBIASED
    ),
    "olmo2": variant("olmo2-biased", **_UNBIASED),
    "olmo3": variant("olmo3-yarn", num_hidden_layers=4, layer_types=_WINDOWS),
    "starcoder2": variant("starcoder2-window"),
    "stablelm": variant("stablelm-biased"),
    "stablelm-whole": variant("stablelm-biased", rope=RopeConfig(), qkv_bias=False),
}


@pytest.mark.parametrize("name", SOME)
def test_it_comes_back(name, tmp_path):
    config = SOME[name]
    save_model(tmp_path / "model", random_decoder(config), dtype=np.dtype("float32"))
    original = open_checkpoint(tmp_path / "model")
    save_gguf(tmp_path / "model.gguf", original, "F32", tokenizer=False)
    back = open_gguf(tmp_path / "model.gguf")
    assert FAMILIES[config.model_type].read_config(back.config) == config
    assert set(back.tensors) == set(original.tensors)
    for tensor in original.tensors:
        # A Gemma's norms have had one added and taken off again.
        atol = 1e-6 if "gemma" in name else 0
        np.testing.assert_allclose(back.read(tensor), original.read(tensor), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            variant("qwen3-biased"),
            "attention_bias is True, but llama.cpp reads a 'qwen3' with",
        ),
        (variant("olmo2-biased"), "attention_bias is True, .* a 'olmo2' with False alone"),
        (variant("starcoder2-unbiased"), "use_bias is False, .* 'starcoder2' with True alone"),
        (
            variant("starcoder2-window", hidden_act="gelu"),
            "hidden_act is gelu, .* with gelu_pytorch_tanh alone",
        ),
        (variant("gemma2-plain", attention_scale=8**-0.5), "tie_word_embeddings is False"),
        (variant("stablelm-biased", tie_word_embeddings=True), "tie_word_embeddings is True"),
        (variant("smollm3-window", **_UNBIASED), "use_sliding_window is True"),
        (variant("smollm3-still"), r"no_rope_layers is \[1, 0, 1\], but .* last of every 4"),
        (variant("olmo3-yarn"), "full attention in the last of every 4 layers"),
        (
            dataclasses.replace(SOME["olmo3"], local_rope=RopeConfig(rope_theta=1e4)),
            "windows' rope_theta is 10000, but llama.cpp turns all layers by 300000",
        ),
        (
            dataclasses.replace(SOME["olmo2"], rope=_LLAMA_3),
            "'llama3', whose factors llama.cpp reads of no 'olmo2'",
        ),
    ],
)
def test_what_llama_cpp_reads_otherwise_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        to_metadata(FAMILIES[config.model_type].write_config(config))


def test_a_scaled_rope_without_windows_comes_back():
    """Which layers slide is not in the file; that none does is."""
    config = dataclasses.replace(SOME["olmo2"], rope=_YARN)
    metadata, _ = to_metadata(FAMILIES["olmo2"].write_config(config))
    found = to_config({"general.architecture": "olmo2", **metadata}, {"output.weight": (1,)}, None)
    assert FAMILIES["olmo2"].read_config(found) == config
