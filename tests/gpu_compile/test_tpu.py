"""The XLA path compiled for TPU v5e chips that are not here: its memory, traffic and exchanges."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

import pallas_kernels

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="no TPU compiler here: pip install libtpu (480 MB)",
)


AUTO = (jax.sharding.AxisType.Auto,)


@pytest.fixture
def chips(monkeypatch):
    """Four chips in a row."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    # Several workers may compile at once: none of them has a chip to itself.
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2x1")
    return topologies.make_mesh(topology, (4,), ("data",)).devices


def on(mesh, *entries):
    """(shape, dtype) -> such an array on the mesh."""
    at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*entries))
    return lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=at)


def packed(mesh, n, k, rows=None):
    """A double-quantized weight, its rows cut along `rows`."""
    blocks = n * k // 64
    cut, whole = on(mesh, rows), on(mesh)
    return (
        cut((n, k // 2), jnp.uint8),
        cut((blocks,), jnp.uint8),
        whole((blocks // 256,), jnp.float32),
        whole((), jnp.float32),
    )


def forward(x, *weight):
    return pallas_kernels.nf4_matmul(x, *weight, implementation="xla")


def transposed(dy, *weight):
    return pallas_kernels.nf4_matmul_transposed(dy, *weight, implementation="xla")


@pytest.mark.parametrize("op", [forward, pytest.param(transposed, marks=pytest.mark.slow)])
def test_a_weight_is_decoded_on_its_way_into_the_product(chips, op):
    """No temporaries, and no more traffic than a dense product of the same shape has."""
    n, k, tokens = 11008, 4096, 1024
    mesh = jax.sharding.Mesh(chips[:1], ("data",), axis_types=AUTO)
    like, inputs = on(mesh), n if op is transposed else k
    x = like((tokens, inputs), jnp.bfloat16)
    compiled = jax.jit(op).lower(x, *packed(mesh, n, k)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20
    dense = like((inputs, n + k - inputs), jnp.bfloat16)
    product = jax.jit(lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32))
    least = product.lower(x, dense).compile().cost_analysis()["bytes accessed"]
    # dx is interleaved from its even and odd columns.
    assert compiled.cost_analysis()["bytes accessed"] < (1.5 if op is transposed else 1) * least


@pytest.mark.slow
def test_dequantizing_takes_no_more_than_the_weight(chips):
    n, k = 11008, 4096
    mesh = jax.sharding.Mesh(chips[:1], ("data",), axis_types=AUTO)
    weight = packed(mesh, n, k)
    dequantize = jax.jit(lambda *w: pallas_kernels.nf4_dequantize(*w, implementation="xla"))
    memory = dequantize.lower(*weight).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.1 * 2 * n * k


@pytest.mark.slow
@pytest.mark.parametrize("op", [forward, transposed])
def test_a_fully_sharded_weight_is_gathered_packed(chips, op):
    n, k, tokens = 4096, 4096, 1024
    mesh = jax.sharding.Mesh(chips, ("data",), axis_types=AUTO)
    x = on(mesh, "data")((4, tokens, k), jnp.bfloat16)
    compiled = jax.jit(op).lower(x, *packed(mesh, n, k, "data")).compile()
    gathered = re.findall(r"= (\w+)\[[\d,]*\]\S* all-gather\(", compiled.as_text())
    assert set(gathered) == {"u8"}
    # Each chip holds a quarter of the codes, not the whole.
    arguments = compiled.memory_analysis().argument_size_in_bytes
    assert n * k // 8 < arguments < n * k // 4 + 2 * tokens * k


def test_one_row_gathers_no_weight(chips):
    n, k = 4096, 4096
    mesh = jax.sharding.Mesh(chips, ("data",), axis_types=AUTO)
    x = on(mesh)((1, k), jnp.bfloat16)
    compiled = jax.jit(forward).lower(x, *packed(mesh, n, k, "data")).compile()
    assert not re.search(r"u8\[\S* all-gather\(", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < n * k // 4
