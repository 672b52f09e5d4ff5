"""Logits of small models under transformers, padded on either side; one row per architecture."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.checkpoints import load_model
from tests.shared import shared_path
from tests.vectors.qlora_run import logits


@pytest.mark.parametrize("name", ["llama_ropescaled_tied"])
def test_logits_right_and_left_padded(name):
    folder = shared_path(f"vectors/models/{name}")
    model = load_model(folder, quant=None, lora=None, compute_dtype=jnp.float32)
    tensors = load_file(folder / "io.safetensors")
    for prefix in ("", "leftpad_"):
        ids, mask = (
            jnp.asarray(tensors[f"{prefix}{key}"].astype(np.int32))
            for key in ("input_ids", "attention_mask")
        )
        assert prefix == "" or not mask[0, 0], "the padding is on the left"
        expected = tensors[f"{prefix}logits"]
        real = np.asarray(mask, bool)
        error = np.abs(np.asarray(logits(model, ids, mask)) - expected)[real].max()
        # One part in a million of the logits' range (4.2 standard deviation): float32 rounding.
        assert error < 1e-6 * np.ptp(expected[real]), error / np.ptp(expected[real])
