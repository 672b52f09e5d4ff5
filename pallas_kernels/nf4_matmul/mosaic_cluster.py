"""What the Hopper matmuls do otherwise where blocks of threads form a *cluster* and share tiles.

Each block fetches a part of a tile, and the copy engine writes it into the shared memory of all of
them (multicast). So a slot of the ring may be filled again only when every block has done with it,
and a block may not end while others still tell it that they have.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.nf4_matmul.mosaic_plan import COMPUTE, MatmulConfig

_AXIS = "block"


def launch_shape(config: MatmulConfig, clusters: int) -> dict[str, Any]:
    """`plgpu.kernel`'s arguments for so many clusters, along the axis "cta"."""
    shape: dict[str, Any] = {"grid": (clusters,), "grid_names": ("cta",)}
    if config.cluster > 1:
        shape |= {"cluster": (config.cluster,), "cluster_names": (_AXIS,)}
    return shape


def own_block(config: MatmulConfig) -> Any:
    """The block's number in its cluster."""
    return lax.axis_index(_AXIS) if config.cluster > 1 else 0


def shared_by(config: MatmulConfig) -> str | None:
    """`copy_gmem_to_smem`'s `collective_axes` for a tile that all blocks of a cluster read."""
    return _AXIS if config.cluster > 1 else None


def emptied(config: MatmulConfig) -> plgpu.Barrier | plgpu.ClusterBarrier:
    """The barriers of the ring's slots, at which each computing warpgroup arrives once it has read
    a tile: those of the block, or of all blocks of the cluster."""
    if config.cluster == 1:
        return plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=config.stages)
    return plgpu.ClusterBarrier(
        collective_axes=(_AXIS,), num_arrivals=COMPUTE, num_barriers=config.stages
    )


def drain(config: MatmulConfig, empty: Any, steps: Any) -> None:
    """After `steps` fills, wait until all blocks of the cluster have read the last ones."""
    if config.cluster == 1:
        return

    def wait(step: Any, carry: Any) -> Any:
        plgpu.barrier_wait(empty.at[lax.rem(step, config.stages)])
        return carry

    lax.fori_loop(jnp.maximum(steps - config.stages, 0), steps, wait, None)
