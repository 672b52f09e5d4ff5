"""LoftQ's start beside PEFT's own."""

import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax.nn import start_from_weight

torch = pytest.importorskip("torch", reason="make test-peers installs it")
bnb = pytest.importorskip("bitsandbytes", reason="make test-peers installs it")
loftq_utils = pytest.importorskip("peft.utils.loftq_utils", reason="make test-peers installs it")


@pytest.fixture
def no_cuda(monkeypatch):
    """PEFT computes LoftQ on "cuda", by name; here that name means the CPU."""
    for kind in (torch.Tensor, bnb.nn.Params4bit):

        def to(self, *args, _original=kind.to, **options):
            args = ["cpu" if isinstance(x, str) and x == "cuda" else x for x in args]
            options = {k: "cpu" if k == "device" and v == "cuda" else v for k, v in options.items()}
            return _original(self, *args, **options)

        monkeypatch.setattr(kind, "to", to)
    monkeypatch.setattr(loftq_utils, "is_xpu_available", lambda: False)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.usefixtures("no_cuda")
def test_base_and_factors_are_pefts(rounds):
    weight = np.random.default_rng(0).normal(scale=0.02, size=(48, 64)).astype(np.float32)
    quantized, a, b = loftq_utils.loftq_init(torch.from_numpy(weight), 4, 8, rounds)
    # PEFT assumes s = 1, and 64 to a block without double quantization.
    lora = ql.LoraConfig(r=8, alpha=8, init_lora_weights="loftq", loftq_iter=rounds)
    quant = ql.QuantConfig("nf4", 64, double_quant=False)
    base, mine_a, mine_b = start_from_weight(jnp.asarray(weight), quant, lora)
    np.testing.assert_allclose(base.dequantize(jnp.float32), quantized.numpy(), rtol=0, atol=1e-7)
    low = (b @ a).numpy()
    np.testing.assert_allclose(mine_b @ mine_a, low, rtol=0, atol=1e-5 * np.abs(low).max())
    # Each factor's rows, or columns, are the same up to their common sign.
    for mine, theirs in ((mine_a, a), (mine_b.T, b.T)):
        same = np.abs(np.asarray(mine)), np.abs(theirs.numpy())
        np.testing.assert_allclose(*same, rtol=0, atol=1e-4 * np.abs(theirs.numpy()).max())
