"""Families that the shared vectors lack, against a decoder in NumPy; every weight is random."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.models import FAMILIES, Decoder
from tests.models import numpy_decoder
from tests.models.variants import VARIANTS
from tests.random_decoder import random_decoder

IDS = np.random.default_rng(0).integers(3, 48, 14).astype(np.int32)


def drawn(name: str) -> Decoder:
    """Norms and biases too, which a fresh model has at 1 and 0."""
    model, rng = random_decoder(VARIANTS[name]), np.random.default_rng(1)
    state = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), nnx.state(model)
    )
    nnx.update(model, state)
    return model


@pytest.mark.parametrize(
    "name",
    [
        "gemma-first",
        "granite-scaled",
        "ministral-mixed",
        "olmo2-biased",
        "olmo3-yarn",
        "olmo3-windows",
        "smollm3-still",
        "smollm3-window",
        "stablelm-biased",
        "starcoder2-unbiased",
        "starcoder2-window",
    ],
)
def test_logits(name):
    model = drawn(name)
    family = FAMILIES[VARIANTS[name].model_type]
    state = nnx.to_pure_dict(nnx.state(model))
    tensors = {
        tensor: functools.reduce(operator.getitem, slot.path, state)[slot.stack_index]
        for tensor, slot in family.weight_names(VARIANTS[name]).items()
    }
    expected = numpy_decoder.logits(family.write_config(VARIANTS[name]), tensors, IDS)
    error = np.abs(np.asarray(jax.jit(model)(IDS[None]))[0] - expected).max()
    assert error < 2e-6 * np.ptp(expected), error / np.ptp(expected)
