"""The XLA path compiles for four TPU v5e chips that are not here."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

import pallas_kernels

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="no TPU compiler here: pip install libtpu (480 MB)",
)


def test_forward_and_backward_compile_for_a_v5e(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2x1")
    mesh = topologies.make_mesh(topology, (4,), ("rows",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def like(shape, dtype, sharding):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    n, k = 4096, 4096
    blocks = n * k // 64
    weight = (
        like((n, k // 2), jnp.uint8, rows),
        like((blocks,), jnp.uint8, rows),
        like((blocks // 256,), jnp.float32, rows),
        like((), jnp.float32, whole),
    )

    def both_ways(x, *weight):
        y = pallas_kernels.nf4_matmul(x, *weight, implementation="xla")
        return y, pallas_kernels.nf4_matmul_transposed(y, *weight, implementation="xla")

    x = like((256, k), jnp.bfloat16, whole)
    memory = jax.jit(both_ways).lower(x, *weight).compile().memory_analysis()
    # Each chip holds a quarter of the codes, not the whole.
    assert n * k // 8 < memory.argument_size_in_bytes < n * k // 4 + 2 * x.size
