"""Damaged and contradicting 4-bit folders; that sound ones are read bit for bit: tests/vectors."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.checkpoints import load_model
from qlora_jax.quant import QuantConfig
from tests.checkpoints.tiny import change_config, change_tensors
from tests.shared import shared_path

FOLDER = shared_path("vectors/llama/bnb4")
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    for path in FOLDER.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_codes_are_taken_over_byte_for_byte(folder):
    # The same bytes, as `quant_storage=bfloat16` would have written them.
    def as_bf16(tensors):
        codes.append(tensors[NAME].copy())
        tensors[NAME] = tensors[NAME].reshape(-1).view(jnp.bfloat16).reshape(-1, 1)

    codes: list[np.ndarray] = []
    change_tensors(folder, as_bf16)
    kernel = load_model(folder, lora=None).layers.mlp.up_proj.kernel.get_value()
    np.testing.assert_array_equal(kernel.codes[0].reshape(-1, 1), codes[0])
    assert kernel.bits_per_weight == pytest.approx(4.128, abs=2e-3)


@pytest.mark.parametrize("quant", [None, QuantConfig("fp4"), QuantConfig(double_quant=False)])
def test_another_quantization_than_the_folders(folder, quant):
    with pytest.raises(ValueError, match=r"quantized already, as QuantConfig\(quant_type='nf4'"):
        load_model(folder, quant=quant)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(NAME + ".nested_absmax"), "lacks .*nested_absmax"),
        (lambda t: t.pop(NAME + ".quant_state.bitsandbytes__nf4"), "has no quant_state"),
        (lambda t: t.update({NAME: t[NAME][:-2]}), "bytes of codes, but its shape"),
        (lambda t: t.update({NAME + ".quant_map": np.ones(16, np.float32)}), "is not bitsandbytes"),
    ],
)
def test_damaged_weights(folder, damage, message):
    change_tensors(folder, damage)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_shapes_are_compared_through_the_state(folder):
    change_config(folder, intermediate_size=512)
    with pytest.raises(ValueError, match=r"has shape \[.*config.json calls for"):
        load_model(folder)
