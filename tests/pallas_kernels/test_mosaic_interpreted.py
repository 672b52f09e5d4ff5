"""The Hopper matmuls in Pallas' GPU interpreter: who waits for whom, and which tile is whose.

The interpreter has a block's threads, barriers and copies, but neither inline instructions nor a
`wgmma` of registers. So a lane program stands for what it computes (its own tests show that it
does), and the product is NumPy's. Weights are small integers: every sum is exact.

The interpreter makes a copy for a cluster as one copy for each block, into its own tile. What the
hardware does besides, writing into the others', may only happen when they have read what was there:
`Reads` counts that at every such copy, and keeps one of the blocks behind. That a block does not
end before the others have told it of their last reads is not shown.
"""

import collections
import functools
import importlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.nf4_matmul.mosaic_plan import COMPUTE, MatmulConfig, Plan
from pallas_kernels.simt import arrays

pytestmark = pytest.mark.skipif(
    jax.__version_info__[:2] != (0, 12),
    reason="reaches into the interpreter of jax 0.12, which other versions have otherwise",
)

M, N = 192, 384
"""Three tiles of 64 rows; three of 128 columns, so that a cluster of two has one past the end."""


class StandIns:
    """What the lane programs of a kernel compute, on whole arrays.

    Codes are x's dtype in the forward kernel, and in dx's two numbers from 0 to 15 a byte.
    """

    def __init__(self, plan):
        self.plan = plan

    def run(self, program, shared, arguments, result=None):
        """In place of `arrays.run`."""
        arguments = [a.ref if isinstance(a, arrays.Tile) else a for a in arguments]
        (name,) = {name for name in program.__code__.co_names if hasattr(self, name)}
        return getattr(self, name)(*arguments)

    def fill_table(self, tables):
        pass

    def load_offset(self, offset):
        return jnp.zeros((128 * 4,), jnp.uint32)

    def load_block(self, first_row, step, codes, absmax, nested):
        block = codes[pl.ds(jnp.minimum(first_row, self.plan.n - 64), 64), pl.ds(step * 64, 64)]
        words = jax.lax.bitcast_convert_type(block.reshape(-1, 2), jnp.uint32)
        return jnp.concatenate([words, jnp.zeros((128 * 4,), jnp.uint32)])

    def decode_block(self, held, mean):
        return jax.lax.bitcast_convert_type(held[:-512], jnp.bfloat16).reshape(64, 64)

    def load_low_rank(self, first_row, step, b):
        return b[pl.ds(jnp.minimum(first_row, self.plan.n - 64), 64), pl.ds(step * 64, 64)]

    def load_scale(self, column, step, absmax, nested):
        return jnp.zeros((128 * 4,), jnp.uint32)

    def store_scale(self, raw, mean, scales):
        pass

    def decode_tile(self, warpgroup, codes, scales):
        own = jax.lax.dynamic_slice(codes[...], (jnp.int32(0), warpgroup * 32), (64, 32))
        return unpacked(jnp, own).T.astype(jnp.bfloat16)

    def store_sums(self, sums, first_row, token, *bias_out_part):
        out, *part = [ref for ref in bias_out_part if ref.shape != (1,)]
        row = token + part[0] * self.plan.m if part else token

        @pl.when(first_row < self.plan.n)
        def _inside():
            out[pl.ds(row, sums.shape[1]), pl.ds(first_row, 64)] = sums.T.astype(out.dtype)


def unpacked(np_like, codes):
    """Two numbers of each byte, side by side."""
    return np_like.stack([codes >> 4, codes & 15], axis=-1).reshape(len(codes), -1)


class Reads:
    """How often the tiles of a ring's slots were filled and read, by cluster, block and slot."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.filled, self.read = collections.Counter(), collections.Counter()

    def note_read(self, thread, slot):
        if thread.block_id:
            time.sleep(0.002)  # a block that is late
        self.read[int(thread.cluster_id), int(thread.block_id), slot] += 1

    def check_fill(self, thread, slot):
        """Before the slot is filled for all blocks: each of them has read all that was there."""
        own = (int(thread.cluster_id), int(thread.block_id), slot)
        for block in range(self.blocks):
            read = self.read[own[0], block, slot]
            assert read >= COMPUTE * self.filled[own], f"block {block} still reads slot {slot}"
        self.filled[own] += 1


def fill_for_all(interpreter, eqn, token, get_invals, reads, copy):
    """`copy_gmem_to_smem` in the interpreter; one for a whole cluster is counted first."""
    from jax._src import callback
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    if eqn.params["collective_axes"]:
        slot = get_invals()[3 + eqn.params["src_transforms_treedef"].num_leaves]

        def check(token, thread, slot):
            reads.check_fill(thread, int(slot))
            return token

        token = callback.io_callback(
            gpu_callbacks.fail_on_exception(check),
            gpu_callbacks.TOKEN_SHAPE_DTYPE,
            *(token, interpreter.thread, slot),
        )
    return copy(interpreter, eqn, token, get_invals)


def multiply_registers(interpreter, eqn, token, get_invals, reads):
    """`wgmma` in the interpreter, its left operand an array."""
    from jax._src import callback
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret

    none = jax.tree.structure([])
    names = ("acc_transforms_tree", "a_transforms_tree", "b_transforms_tree")
    trees = jax.tree_util.treedef_tuple(tuple(eqn.params[name] or none for name in names))
    acc, a, b, *leaves = get_invals()
    acc_transforms, _, b_transforms = jax.tree.unflatten(trees, leaves)
    acc, _ = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, acc, acc_transforms)
    b, b_transforms = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, b, b_transforms)

    def product(token, location, thread, acc, a, b, b_transforms):
        memory = gpu_callbacks._get_shared_memory()
        where = gpu_callbacks.memory.GPULoggingInfo(location, thread, eqn.source_info)

        def read(key, transforms):
            inside = memory.access(key, transforms)
            return inside, memory.get_buffer_content(key, inside, thread, logging_info=where)[0]

        acc_key, b_key = map(gpu_callbacks.HostAllocationKey.from_array, (acc, b))
        b_transforms = gpu_callbacks._remove_noop_transforms(b_transforms)
        _, right = read(b_key, jax.tree.map(int, b_transforms))
        everything, sums = read(acc_key, ())
        sums = sums + np.asarray(a, np.float32) @ np.asarray(right, np.float32)
        memory.store_buffer_content(acc_key, everything, sums, thread, logging_info=where)
        reads.note_read(thread, int(jax.tree.leaves(b_transforms)[0]))
        return token

    return callback.io_callback(
        gpu_callbacks.fail_on_exception(product),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        *(token, interpreter.mesh_location, interpreter.thread, acc, a, b, b_transforms),
    ), []


@pytest.fixture
def interpreted(monkeypatch):
    """(kernel module, plan, operands) -> the kernel's result, on four multiprocessors."""
    from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret, params

    for name in ("nf4_matmul.mosaic_plan", "nf4_matmul_transposed.mosaic_sm90"):
        monkeypatch.setattr(importlib.import_module(f"pallas_kernels.{name}"), "SMS", 4)
    interpreter = jaxpr_interpret.JaxprInterpreter
    copy = interpreter._interpret_copy_gmem_to_smem_p

    def run(module, plan, *operands):
        reads = Reads(plan.config.cluster)
        multiply = functools.partialmethod(multiply_registers, reads=reads)
        fill = functools.partialmethod(fill_for_all, reads=reads, copy=copy)
        monkeypatch.setattr(interpreter, "_interpret_wgmma_ref_p", multiply)
        monkeypatch.setattr(interpreter, "_interpret_copy_gmem_to_smem_p", fill)
        monkeypatch.setattr(arrays, "run", StandIns(plan).run)
        with params.force_gpu_interpret_mode():
            return np.asarray(module._kernel(plan)(*operands), np.float32)

    return run


def small(rng, *shape):
    return jnp.asarray(rng.integers(-1, 2, shape), jnp.bfloat16)


UNUSED = jnp.zeros((1,), jnp.float32)


@pytest.mark.parametrize(
    ("k", "rank", "options"),
    [
        (320, 0, {}),
        (320, 0, {"cluster": 2}),
        (320, 0, {"cluster": 2, "stages": 2, "ahead": False, "group": 1}),
        (256, 0, {"cluster": 2, "split": 2}),
        (320, 128, {"cluster": 2, "stages": 3}),
    ],
)
def test_forward(interpreted, k, rank, options):
    rng = np.random.default_rng(k)
    plan = Plan(M, N, k, "bfloat16", True, False, MatmulConfig(rows=64, **options), rank)
    assert plan.grid < plan.work  # blocks go on to further tiles
    x, w = small(rng, M, k), small(rng, N, k)
    low = (small(rng, M, rank), small(rng, N, rank)) if rank else ()
    module = importlib.import_module("pallas_kernels.nf4_matmul.mosaic_sm90")
    got = interpreted(module, plan, x, *low, w, *[UNUSED] * 5)
    want = np.asarray(x, np.float32) @ np.asarray(w, np.float32).T
    if low:
        want += np.asarray(low[0], np.float32) @ np.asarray(low[1], np.float32).T
    if plan.config.split > 1:
        got = got.reshape(plan.config.split, M, N).sum(axis=0)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "options", [{}, {"cluster": 2}, {"cluster": 2, "stages": 2, "ahead": False}]
)
def test_dx(interpreted, options):
    rng, contracted = np.random.default_rng(0), 320
    module = importlib.import_module("pallas_kernels.nf4_matmul_transposed.mosaic_sm90")
    config = MatmulConfig(rows=64, **options)
    plan = module.Plan(M, N, contracted, "bfloat16", True, config)
    dy = small(rng, M, contracted)
    codes = jnp.asarray(rng.integers(0, 256, (contracted, N // 2)), jnp.uint8)
    got = interpreted(module, plan, dy, codes, *[UNUSED] * 4)
    want = np.asarray(dy, np.float32) @ unpacked(np, np.asarray(codes)).astype(np.float32)
    np.testing.assert_array_equal(got, np.asarray(jnp.asarray(want, jnp.bfloat16), np.float32))
