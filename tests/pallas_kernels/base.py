"""One float64 reference and one drawing of inputs for every implementation of every op."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from pallas_kernels import CODEBOOKS, DYNAMIC_SIGNED

ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}


@dataclasses.dataclass(frozen=True)
class Case:
    """A packed weight [n, k], its arrays and the float32 values that they stand for."""

    n: int
    k: int
    quant_type: str
    blocksize: int
    codes: np.ndarray
    absmax: np.ndarray
    nested_absmax: np.ndarray | None
    offset: np.ndarray | None

    @property
    def arrays(self):
        """codes, absmax, nested_absmax, offset as jax arrays."""
        parts = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return tuple(None if p is None else jnp.asarray(p) for p in parts)

    @property
    def keywords(self):
        return {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "shape": (self.n, self.k),
        }

    @property
    def scales(self) -> np.ndarray:
        """float32 absmax; NumPy rounds product and sum apart, as the definition wants."""
        if self.nested_absmax is None:
            return self.absmax
        nested = np.repeat(self.nested_absmax, 256)[: self.absmax.size]
        return DYNAMIC_SIGNED[self.absmax] * nested + self.offset

    @property
    def weight(self) -> np.ndarray:
        """float32 table[code] · absmax, [n, k]."""
        flat = self.codes.reshape(-1)
        if self.quant_type != "int8":
            flat = np.stack([flat >> 4, flat & 15], -1).reshape(-1)
        values = CODEBOOKS[self.quant_type][flat[: self.n * self.k]]
        scale = np.repeat(self.scales, self.blocksize)[: self.n * self.k]
        return (values * scale).reshape(self.n, self.k)

    def weight_as(self, dtype) -> np.ndarray:
        """The weight in `dtype`, rounded once, as float64."""
        return np.asarray(jnp.asarray(self.weight).astype(dtype)).astype(np.float64)


def make_case(
    seed: int,
    n: int,
    k: int,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    zero_block: bool = False,
    outlier: bool = False,
) -> Case:
    """Random bytes and scales; optionally one block of scale zero, one of scale 1000."""
    rng = np.random.default_rng(seed)
    size = n * k
    nbytes = size if quant_type == "int8" else (size + 1) // 2
    codes = rng.integers(0, 256, nbytes, dtype=np.uint8)
    per_row = k if quant_type == "int8" else k // 2
    codes = codes.reshape(n, per_row) if n * per_row == nbytes else codes
    blocks = -(-size // blocksize)
    if double_quant:
        absmax = rng.integers(0, 256, blocks, dtype=np.uint8)
        nested = rng.random(-(-blocks // 256), dtype=np.float32) + np.float32(0.1)
        offset = np.asarray(rng.random() + 1.0, np.float32)
        return Case(n, k, quant_type, blocksize, codes, absmax, nested, offset)
    absmax = rng.random(blocks, dtype=np.float32)
    if outlier:
        absmax[blocks // 2] = 1000.0
    if zero_block:
        absmax[0] = 0.0
    return Case(n, k, quant_type, blocksize, codes, absmax, None, None)


@st.composite
def cases(draw, *, whole_rows: bool, types=("nf4", "fp4", "fp4_e3m0", "int4")):
    """Weights of drawn shape and kind; with `whole_rows`, k is a multiple of the block size."""
    blocksize = draw(st.sampled_from([32, 64, 128, 256]))
    n = draw(st.integers(1, 70))
    k = draw(st.integers(1, 3)) * blocksize if whole_rows else draw(st.integers(1, 150))
    return make_case(
        seed=draw(st.integers(0, 2**16)),
        n=n,
        k=k,
        quant_type=draw(st.sampled_from(types)),
        blocksize=blocksize,
        double_quant=draw(st.booleans()),
        zero_block=draw(st.booleans()),
        outlier=draw(st.booleans()),
    )


dtypes = st.sampled_from(["bfloat16", "float16", "float32"])


def activations(seed: int, rows: int, width: int, dtype) -> jnp.ndarray:
    """Standard normal rows."""
    values = np.random.default_rng(seed + 1).standard_normal((rows, width)).astype(np.float32)
    return jnp.asarray(values).astype(dtype)


def adapter(seed: int, rows: int, n: int, rank: int, dtype) -> tuple[jnp.ndarray, jnp.ndarray]:
    """An adapter's (xa [rows, rank], b [n, rank])."""
    return activations(seed, rows, rank, dtype), activations(seed + 1, n, rank, dtype)


def assert_adapted(out, x, weight: np.ndarray, lora, bias, fuse: bool):
    """`out` = x · weightᵀ + xa · bᵀ + bias, `lora` = (xa, b) or None: one sum where `fuse`d.

    Otherwise both products are rounded to x's dtype before they are added.
    """
    if bias is not None:
        bias = np.asarray(bias).astype(np.float64)
    if lora is None:
        assert_product(out, x, weight, bias)
        return
    x = jnp.concatenate([x, lora[0]], axis=1)
    weight = np.concatenate([weight, np.asarray(lora[1])], axis=1)
    assert_product(out, x, weight, bias, roundings=1 if fuse else 3)


def assert_product(out, x, weight: np.ndarray, bias=None, roundings=1):
    """`out` = x · weightᵀ + bias, to the rounding of x's dtype and of a float32 sum.

    `weight` is the float32 one: an implementation may round it to x's dtype or keep it. Rows of x
    that hold inf or NaN must not be finite; they must leave all other rows alone.
    """
    assert out.dtype == x.dtype
    unit = ROUNDOFF[str(x.dtype)]
    x64, w64 = np.asarray(x).astype(np.float64), weight.astype(np.float64)
    got = np.asarray(out).astype(np.float64)
    finite = np.isfinite(x64).all(axis=1)
    wanted = x64[finite] @ w64.T
    bound = np.abs(x64[finite]) @ np.abs(w64).T
    if bias is not None:
        wanted, bound = wanted + bias, bound + np.abs(bias)
    # One rounding of each weight and of the result, and those of a float32 sum.
    limit = bound * (unit + 2.0**-24 * (8 + x.shape[1] / 8)) + np.abs(wanted) * unit * 1.01 + 1e-30
    limit += (roundings - 1) * bound * unit
    assert np.isfinite(got[finite]).all()
    worst = np.max(np.abs(got[finite] - wanted) / limit, initial=0.0)
    assert worst <= 1.0, f"error is {worst:.2f} times its bound"
    if not finite.all():
        touched = (np.abs(w64) > 0).any(axis=1)
        assert not np.isfinite(got[~finite][:, touched]).any()
