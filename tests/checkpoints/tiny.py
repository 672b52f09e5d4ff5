"""A tiny Llama folder to load: made here, so that these tests need nothing from elsewhere."""

import json
from pathlib import Path

import jax.numpy as jnp
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints import save_model
from qlora_jax.models import Decoder, DecoderConfig
from tests.random_decoder import random_decoder

CONFIG = DecoderConfig(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    qkv_bias=True,
    o_bias=True,
)
IDS = jnp.asarray([[1, 5, 9, 23], [2, 3, 4, 0]], jnp.int32)


def write_model(folder: Path, config: DecoderConfig = CONFIG) -> Decoder:
    """A dense model, saved; returned as it is in memory."""
    model = random_decoder(config)
    save_model(folder, model)
    return model


def change_tensors(folder: Path, change) -> None:
    """Rewrites model.safetensors after `change(tensors)`, a dict of arrays."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_config(folder: Path, *, file: str = "config.json", **fields) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
