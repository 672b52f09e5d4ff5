"""8-bit AdamW against bitsandbytes' recorded steps.

bitsandbytes' CPU library finds the 8-bit code through a table of 65,536 bins, ours (as its CUDA
kernels) through the exact nearest search, and a code that differs in the second moment of a small
gradient moves a parameter visibly. So the comparison goes through a third program, NumPy, which
does the steps with either search: with the bins it is bitsandbytes, with the exact search it is
ours.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from pallas_kernels.codebooks import DYNAMIC_SIGNED, DYNAMIC_UNSIGNED
from qlora_jax.optim import eight_bit
from tests.shared import shared_path

LR, B1, B2, EPS, DECAY, BLOCK = 1e-3, 0.9, 0.999, 1e-8, 0.01, 256
F32 = np.float32
Search = Callable[[np.ndarray, np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    return load_file(shared_path("vectors/optim") / "adam.safetensors")


def exact(s: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.searchsorted((table[:-1] + table[1:]) * F32(0.5), s).astype(np.uint8)


def bins(s: np.ndarray, table: np.ndarray) -> np.ndarray:
    centres = (np.arange(65536) / F32(65535) * 2 - 1).astype(F32)
    index = ((s + F32(1)) * F32(0.5) * F32(65535) + F32(0.5)).astype(np.uint16)
    return exact(centres, table)[index]


def quantize(x: np.ndarray, table: np.ndarray, search: Search) -> tuple[np.ndarray, np.ndarray]:
    blocks = np.pad(x, (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(axis=1)
    return search((blocks * (F32(1) / absmax)[:, None]).ravel()[: x.size], table), absmax


def numpy_steps(vectors, search: Search) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The parameter after every step, and codes and absmax of both moments after the last."""
    p = vectors["init.p1"]
    m, v, after, stored = np.zeros_like(p), np.zeros_like(p), [], []
    for t in (1, 2, 3):
        g = vectors[f"grad{t - 1}.p1"]
        m = m * F32(B1) + F32(1 - B1) * g
        v = v * F32(B2) + F32(1 - B2) * g * g
        denominator = np.sqrt(v) / F32(np.sqrt(1 - B2**t)) + F32(EPS)
        p = p * F32(1 - LR * DECAY) - F32(LR / (1 - B1**t)) * m / denominator
        after.append(p)
        stored = [*quantize(m, DYNAMIC_SIGNED, search), *quantize(v, DYNAMIC_UNSIGNED, search)]
        m = DYNAMIC_SIGNED[stored[0]] * np.repeat(stored[1], BLOCK)[: m.size]
        v = DYNAMIC_UNSIGNED[stored[2]] * np.repeat(stored[3], BLOCK)[: v.size]
    return after, stored


def test_with_the_cpu_librarys_search_numpy_is_bitsandbytes(vectors):
    after, stored = numpy_steps(vectors, bins)
    for t, p in enumerate(after):
        # Two numbers of 4,200 fall on the edge of a bin.
        far = np.abs(p - vectors[f"bnb_adamw8.step{t}.p1"]) > 1e-8
        assert far.sum() <= 2
    for codes, absmax, number in ((stored[0], stored[1], 1), (stored[2], stored[3], 2)):
        off = np.abs(codes.astype(int) - vectors[f"bnb_adamw8.state{number}.p1"])
        assert off.max() <= 1
        assert (off > 0).sum() <= 2
        np.testing.assert_allclose(absmax, vectors[f"bnb_adamw8.absmax{number}.p1"], rtol=1e-6)


def test_with_the_exact_search_numpy_is_ours(vectors):
    after, stored = numpy_steps(vectors, exact)
    tx = eight_bit(optax.adamw(LR, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY))
    params = {name: jnp.asarray(vectors[f"init.{name}"]) for name in ("p0", "p1")}
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(3):
        grads = {name: jnp.asarray(vectors[f"grad{t}.{name}"]) for name in params}
        params, state = step(params, state, grads)
        far = np.abs(params["p1"] - after[t]) > 1e-7
        assert far.sum() <= 2, far.sum()
    adam = state[0]
    for found, codes, absmax in (
        (adam.mu["p1"], stored[0], stored[1]),
        (adam.nu["p1"], stored[2], stored[3]),
    ):
        off = np.abs(np.asarray(found.codes, int) - codes)
        # A quotient within rounding of a midpoint may fall on its other side.
        assert off.max() <= 1
        assert (off > 0).sum() <= 4, (off > 0).sum()
        np.testing.assert_allclose(found.absmax, absmax, rtol=1e-6)
    # Below 4,096 numbers the state stays in 32 bits, there and here.
    np.testing.assert_allclose(params["p0"], vectors["bnb_adamw8.final.p0"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(adam.mu["p0"], vectors["bnb_adamw8.state1.p0"], rtol=1e-5)
