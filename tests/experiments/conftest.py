"""A Llama of two layers and random weights, with the embedded tokenizer: enough to run a sweep."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments.embedded import ROOT
from qlora_jax.checkpoints import save_model
from qlora_jax.models import DecoderConfig
from tests.random_decoder import random_decoder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = DecoderConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    save_model(folder, random_decoder(config), dtype=jnp.dtype(jnp.bfloat16))
    for file in (ROOT / "tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder
