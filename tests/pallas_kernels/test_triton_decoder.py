"""The inline PTX of the "pairs" decoder, executed by a small NumPy emulation of its instructions.

Pallas' interpreter cannot run inline PTX, and decodes by table instead; so here the very text that
a card would get is run for every byte, lane and warp count, and bank conflicts are counted.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import CODEBOOKS, _triton_decoder
from pallas_kernels._triton import pack_pairs
from pallas_kernels._triton_decoder import _READ_ASM, _SHARED, _UNPACK, _fill_asm

TABLE = CODEBOOKS["nf4"].view(np.uint32)


def prmt(a, b, selector):
    """PTX prmt.b32 in its default mode, on uint64 arrays holding 32-bit values."""
    source = a | b << np.uint64(32)
    out = np.zeros_like(a)
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = source >> np.uint64(8 * (pick & 7)) & np.uint64(0xFF)
        if pick & 8:
            byte = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        out |= byte << np.uint64(8 * i)
    return out


def compute(op, v, args):
    """The result of an instruction without memory, for operands `v` written as `args`."""
    if op == "prmt.b32":
        return prmt(v[0], v[1], int(args[2], 0))
    return {
        "mov.u32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "add.u32": lambda a, b: a + b,
        "shl.b32": lambda a, b: a << b,
        "mad.lo.u32": lambda a, b, c: a * b + c,
    }[op](*v)


def run(asm, lanes, memory, operands):
    """Execute one instance of `asm` for all lanes at once; returns bytes touched per access."""
    registers = {"%laneid": lanes.astype(np.uint64), "nf4_pairs": np.zeros_like(lanes, np.uint64)}
    registers |= {f"${i}": np.asarray(v, np.uint64) for i, v in operands.items()}
    touched = []

    def value(name):
        if name in registers:
            return registers[name]
        return np.full(lanes.shape, int(name, 0), np.uint64)

    statements = [s.strip() for s in re.split(r"[;\n]", asm) if s.strip(" {}\n;")]
    for statement in statements:
        if statement.startswith((".reg", ".shared", "{", "}")):
            continue
        op, rest = statement.split(None, 1)
        if op == "st.shared.v4.f32":
            address, values = re.match(r"\[(\S+)\], \{(.*)\}", rest).groups()
            touched.append((value(address), 16))
            for i, name in enumerate(values.split(",")):
                memory[(value(address).astype(np.int64) + 4 * i) // 4] = value(name.strip())
            continue
        if op == "ld.shared.b64":
            target, address = re.match(r"(\S+), \[(\S+)\]", rest).groups()
            touched.append((value(address), 8))
            at = value(address).astype(np.int64) // 4
            registers[target] = memory[at] | memory[at + 1] << np.uint64(32)
            continue
        target, *args = (part.strip() for part in rest.split(","))
        v = [value(a) for a in args]
        registers[target] = compute(op, v, args) & np.uint64(0xFFFFFFFF)
    return registers, touched


def fill(num_warps):
    """Shared memory after all warps of a program have run the filling PTX."""
    memory = np.full(_SHARED // 4, 0xDEADBEEF, np.uint64)
    threads, count = 32 * num_warps, max(256, 32 * num_warps)
    entries = count // threads
    for warp in range(num_warps):
        lanes = np.arange(32)
        thread = warp * 32 + lanes
        operands = {}
        for e in range(entries):
            byte = (thread * entries + e) & 255
            operands[entries + e] = byte
            operands[2 * entries + e] = TABLE[byte >> 4]
            operands[3 * entries + e] = TABLE[byte & 15]
        _, touched = run(_fill_asm(entries), lanes, memory, operands)
        assert all(wavefronts(*t) == 4 for t in touched), "a 16-byte store takes four turns at best"
    return memory


def wavefronts(address, size):
    """Turns that shared memory takes: 128 bytes in one if no bank is asked for two words."""
    turns = 0
    for group in np.split(address.astype(np.int64), 32 * size // 128):
        words = np.unique((group[:, None] + np.arange(0, size, 4)) // 4)
        turns += np.bincount(words % 32).max()
    return turns


@pytest.mark.parametrize("num_warps", [1, 2, 4, 8, 16])
def test_every_byte_in_every_lane(num_warps):
    memory = fill(num_warps)
    assert (memory != 0xDEADBEEF).all()
    lanes = np.arange(32)
    rng = np.random.default_rng(0)
    for byte in range(256):
        word = rng.integers(0, 256, (32, 4))
        word[:, byte % 4] = byte
        packed = (word << np.array([0, 8, 16, 24])).sum(axis=1)
        operands = {4: packed, **{5 + i: np.zeros(32) for i in range(4)}}
        registers, touched = run(_READ_ASM, lanes, memory, operands)
        for j in range(4):
            got = registers[f"${j}"]
            np.testing.assert_array_equal(got & np.uint64(0xFFFFFFFF), TABLE[word[:, j] >> 4])
            np.testing.assert_array_equal(got >> np.uint64(32), TABLE[word[:, j] & 15])
        assert all(wavefronts(*t) == 2 for t in touched), "bank conflict"


@pytest.mark.parametrize("num_warps", [1, 8, 16])
def test_every_byte_has_a_thread_that_stores_it(monkeypatch, num_warps):
    def fill(text, *, args, pack, **_):
        byte, high, low = map(np.asarray, args)
        assert (text, byte.size) == (_fill_asm(pack), 32 * num_warps * pack)
        assert set(byte.tolist()) == set(range(256))
        np.testing.assert_array_equal(high, CODEBOOKS["nf4"][byte >> 4])
        np.testing.assert_array_equal(low, CODEBOOKS["nf4"][byte & 15])
        return [jnp.zeros(byte.shape, jnp.int32)]

    monkeypatch.setattr(_triton_decoder.plgpu, "elementwise_inline_asm", fill)
    monkeypatch.setattr(_triton_decoder, "load", lambda ref, index: ref[index])
    assert _triton_decoder._fill_pairs(jnp.asarray(CODEBOOKS["nf4"]), num_warps) == 0


def test_prmt_itself():
    """Against the PTX manual's definition, on all 65536 selectors of one pair of words."""
    a, b = 0x83022190, 0xF5E4D37C
    source = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    for selector in range(0, 65536, 7):
        wanted = 0
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = source[nibble & 7]
            byte = (0xFF if byte >> 7 else 0) if nibble & 8 else byte
            wanted |= byte << 8 * i
        assert prmt(np.array([a], np.uint64), np.array([b], np.uint64), selector)[0] == wanted


def evaluate(text, *, args, constraints, pack, result_shape_dtypes):
    """In place of `elementwise_inline_asm`: a few instructions on `$1 …`, one result, `$0`."""

    def number(a):
        return a if a.dtype == np.float32 else np.ascontiguousarray(a).view(np.float32)

    operations = {
        "shl.b32": lambda a, b: a << b,
        "and.b32": lambda a, b: a & b,
        "mov.b32": lambda a: a,
        "cvt.f32.f16": lambda a: a.view(np.float16).astype(np.float32),
        "mul.rn.f32": lambda a, b: number(a) * number(b),
        "fma.rn.f32": lambda a, b, c: (number(a).astype(np.float64) * number(b) + number(c)).astype(
            np.float32
        ),
    }
    registers = {f"${i}": np.array(a) for i, a in enumerate(args, 1)}
    for statement in filter(None, (part.strip() for part in text.strip("{} ").split(";"))):
        op, rest = statement.split(None, 1)
        names = [name.strip(" {}") for name in rest.split(",")]
        if op == ".reg":
            continue
        if rest.startswith("{"):  # a register taken apart, its low half first
            whole = registers[names[2]]
            half = np.dtype(f"u{whole.itemsize // 2}")
            for i in (0, 1):
                registers[names[i]] = whole.view(half).reshape(-1, 2)[:, i].copy()
            continue
        values = [registers[n] if n in registers else np.uint32(int(n, 0)) for n in names[1:]]
        registers[names[0]] = operations[op](*values)
    return [jnp.asarray(number(registers["$0"]))]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_pair_is_multiplied_in_its_order(monkeypatch, dtype):
    monkeypatch.setattr(_triton_decoder.plgpu, "elementwise_inline_asm", evaluate)
    monkeypatch.setattr(_triton_decoder, "load", lambda ref, index, mask=None, other=0: ref[index])
    high, low, x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    x = jnp.asarray(np.stack([x, high + low]).T.reshape(1, -1)).astype(dtype)
    row, pair = jnp.zeros(8, jnp.int32), jnp.arange(8)
    values = jnp.asarray(high), jnp.asarray(low)
    found = _triton_decoder.pair_product(*values, pack_pairs(x), row, pair, None, x.dtype)
    even, odd = np.asarray(x, np.float64).reshape(8, 2).T
    np.testing.assert_allclose(found, high * even + low * odd, rtol=1e-6, atol=1e-6)


def test_the_first_of_a_pair_is_the_high_nibbles(monkeypatch):
    values = np.arange(8, dtype=np.float32).reshape(4, 2)

    def read_or_take_apart(text, **options):
        if text == _READ_ASM:
            return [jnp.asarray(values.view(np.int64)[:, 0])]
        return evaluate(text, **options)

    monkeypatch.setattr(_triton_decoder.plgpu, "elementwise_inline_asm", read_or_take_apart)
    with jax.enable_x64(True):
        high, low = _triton_decoder._read_pairs(jnp.zeros(4, jnp.uint8), jnp.int32(0))
    np.testing.assert_array_equal([high, low], values.T)


def test_bfloat16_pairs_are_float32_halves():
    """What the PTX of `pair_product` relies on."""
    x = jnp.asarray([1.5, -2.25, np.inf, np.nan, 1e-40], jnp.bfloat16)
    shifted = np.asarray(x).view(np.uint16).astype(np.uint32) << 16
    np.testing.assert_array_equal(shifted.view(np.float32), np.asarray(x).astype(np.float32))
    assert set(_UNPACK) == {"bfloat16", "float16"}
