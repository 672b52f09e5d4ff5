"""benchmarks/gpu_floor.py at toy size, and its kernel as a card would run it."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _hopper_read, gpu_floor
from pallas_kernels import compile_for
from pallas_kernels.cards import CARDS
from pallas_kernels.nf4_gemv.mosaic_plan import STARTS_EARLY
from pallas_kernels.simt.emulate import Machine
from tests.memory.goals import needs_compiler


def test_every_word_is_read():
    words = np.random.default_rng(0).integers(-(2**31), 2**31, 3 * gpu_floor.TILE - 40)
    words = words.astype(np.int32)
    sums = gpu_floor.read(jnp.asarray(words), interpret=True)
    whole = np.pad(words, (0, 40)).reshape(3, -1)
    np.testing.assert_array_equal(sums, whole.sum(1, dtype=np.int32)[None])


def test_the_toy_shapes_are_timed(tmp_path):
    out = tmp_path / "floor.json"
    assert gpu_floor.main(["--toy", "--repeats", "1", "--out", str(out)]) == 0
    for shape in json.loads(out.read_text())["shapes"]:
        assert min(shape["launch"], shape["read"], shape["bf16"]) > 0


def test_every_word_is_read_on_hopper():
    """By the blocks that have a part of them; each asks for the first of its bytes, and no more."""
    count = _hopper_read.TURN // 4 * 5 - 40
    words = np.random.default_rng(0).integers(0, 2**32, count, dtype=np.uint32)
    sums = np.zeros(_hopper_read.THREADS * 4, np.uint32)
    for cta in range(4):  # two turns each; the last has nothing
        machine = Machine(cta, _hopper_read.THREADS, 16)
        for program in (_hopper_read.ask, _hopper_read.read):
            program(words.nbytes, 2, machine, words, sums)
        first, end = (min(block * 2 * _hopper_read.TURN, words.nbytes) for block in (cta, cta + 1))
        assert machine.asked == [[(first, end - first)] if first < end else []]
    assert sums.sum(dtype=np.uint32) == words.sum(dtype=np.uint32)
    assert np.count_nonzero(sums) == 3 * _hopper_read.THREADS


@needs_compiler
@pytest.mark.parametrize("early", [False, True] if STARTS_EARLY else [False])
def test_hopper_reads_eight_times_sixteen_bytes_at_a_time(early):
    words = jax.ShapeDtypeStruct((2**20,), jnp.int32)
    run = functools.partial(_hopper_read.read_on_hopper, early=early)
    _, (kernel,) = compile_for.inspect_kernels(CARDS["h200"], run, words)
    assert len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", kernel.ptx)) == _hopper_read.LOADS
    assert ("griddepcontrol.wait" in kernel.ptx) is early
    assert kernel.spill_bytes in (0, None)


@needs_compiler
def test_a_card_reads_sixteen_bytes_at_a_time():
    words = jax.ShapeDtypeStruct((4 * gpu_floor.TILE,), jnp.int32)
    _, (kernel,) = compile_for.inspect_kernels(CARDS["h200"], gpu_floor.read, words)
    assert "ld.global.v4.b32" in kernel.ptx
    assert kernel.threads == 256
