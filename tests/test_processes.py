"""Two processes do what one does: training, adapters in and out, generation."""

import json

import jax.numpy as jnp
import pytest

from qlora_jax.checkpoints import save_model
from qlora_jax.models import DecoderConfig
from tests import process_worker
from tests.processes import run_together
from tests.random_decoder import random_decoder


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
    )
    folder = tmp_path / "model"
    save_model(folder, random_decoder(config), dtype=jnp.dtype(jnp.float32))
    one = process_worker.work(folder, tmp_path / "one")
    arguments = ["--model", str(folder), "--out", str(tmp_path / "two")]
    for ended in run_together("tests.process_worker", arguments):
        assert ended.status == 0, ended.err
        found = json.loads(ended.out.splitlines()[-1])
        assert found["written"] == one["written"]
        assert found["loss"] == pytest.approx(one["loss"], rel=1e-5)
