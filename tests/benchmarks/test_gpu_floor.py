"""benchmarks/gpu_floor.py at toy size, and its kernel as a card would run it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_floor
from pallas_kernels import compile_for
from pallas_kernels.cards import CARDS


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


@pytest.mark.skipif(
    not compile_for.gpu_compiler_available(),
    reason=f"no GPU compiler here. {compile_for.PLUGIN_HINT}",
)
def test_a_card_reads_sixteen_bytes_at_a_time():
    words = jax.ShapeDtypeStruct((4 * gpu_floor.TILE,), jnp.int32)
    _, (kernel,) = compile_for.inspect_kernels(CARDS["h200"], gpu_floor.read, words)
    assert "ld.global.v4.b32" in kernel.ptx
    assert kernel.threads == 256
