"""The Hopper matmuls in Pallas' GPU interpreter: who waits for whom, which tile and scale is whose.

The interpreter has a block's threads, barriers and copies, but neither inline instructions nor a
`wgmma` of registers. So a lane program stands for what it computes (its own tests show that it
does), and the product is NumPy's. Weights are small integers: every sum is exact.

A slot of the ring may be filled only when both computing warpgroups have read what was there:
`Reads` counts that at every copy of x's tiles. Blocks that work as a team run side by side here as
a cluster, and `Team` is their semaphores: it counts what they copy from their room, which may be
overwritten only after that.
"""

import collections
import functools
import importlib
import inspect
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.nf4_matmul import mosaic_team, mosaic_team_lanes
from pallas_kernels.nf4_matmul.mosaic_plan import COMPUTE, MatmulConfig, Plan
from pallas_kernels.nf4_matmul.mosaic_ring import SCALE_WORDS
from pallas_kernels.simt import arrays

pytestmark = pytest.mark.skipif(
    jax.__version_info__[:2] != (0, 12),
    reason="reaches into the interpreter of jax 0.12, which other versions have otherwise",
)

M, N = 192, 384
"""Three tiles of 64 rows; three of 128 columns."""


class StandIns:
    """What the lane programs of a kernel compute, on whole arrays.

    Codes are two numbers from 0 to 15 a byte, and scales `scale_of` their place: 12 at most, so
    that a weight is exact in bfloat16.
    """

    def __init__(self, plan):
        self.plan = plan

    def run(self, program, shared, arguments, result=None):
        """In place of `arrays.run`."""
        arguments = [a.ref if isinstance(a, arrays.Tile) else a for a in arguments]
        (name,) = {name for name in program.__code__.co_names if hasattr(self, name)}
        found = inspect.getclosurevars(program).nonlocals
        static = [found[name] for name in ("i", "piece") if name in found]
        return getattr(self, name)(*arguments, *static)

    def fill_table(self, tables):
        pass

    def load_offset(self, offset):
        return jnp.zeros((128 * 4,), jnp.uint32)

    def load_group(self, first, step, absmax, nested):
        place = jnp.stack([first, step]).astype(jnp.uint32)
        return jnp.zeros((128 * SCALE_WORDS,), jnp.uint32).at[:2].set(place)

    def load_low_rank(self, first_row, step, b):
        return b[pl.ds(jnp.minimum(first_row, self.plan.n - 64), 64), pl.ds(step * 64, 64)]

    def store_scale(self, raw, mean, scales, i):
        first, step = raw[:2].astype(jnp.int32)
        scales[...] = scale_of(first // 128, step + i, jnp.arange(128)).astype(jnp.float32)

    def read_codes(self, warpgroup, *tiles):
        """This warpgroup's share: columns of dx's one tile, even and odd rows of the other's."""
        if len(tiles) == 1:
            return jax.lax.dynamic_slice(tiles[0][...], (jnp.int32(0), warpgroup * 32), (64, 32))
        rows = jnp.stack([tile[...] for tile in tiles], axis=1).reshape(-1, 32)
        return jax.lax.dynamic_slice(rows, (warpgroup * 64, jnp.int32(0)), (64, 32))

    def find_weights(self, warpgroup, codes, scales):
        return codes, jax.lax.dynamic_slice(scales[...], (warpgroup * 64,), (64,))

    def scale_weights(self, found):
        codes, scales = found
        weights = (unpacked(jnp, codes) * scales[:, None]).astype(jnp.bfloat16)
        return weights if isinstance(self.plan, Plan) else weights.T

    def store_sums(self, sums, first_row, token, *bias_out_part):
        out, *part = [ref for ref in bias_out_part if ref.shape != (1,)]
        row = token + part[0] * self.plan.m if part else token

        @pl.when(first_row < self.plan.n)
        def _inside():
            out[pl.ds(row, sums.shape[1]), pl.ds(first_row, 64)] = sums.T.astype(out.dtype)


def scale_of(tile, step, thread):
    """What the feeding warpgroup's thread stores for a step of the weight, of its tile of W."""
    return (1 + tile % 2) * (1 + step % 3) * (1 + (thread + thread // 64) % 2)


def unpacked(np_like, codes):
    """Two numbers of each byte, side by side."""
    return np_like.stack([codes >> 4, codes & 15], axis=-1).reshape(len(codes), -1)


class Reads:
    """How often the tiles of a ring's slots were filled and read, by block and slot.

    A `wgmma` may read until a wait leaves none as young as it under way (PTX, `wgmma.wait_group`).
    """

    def __init__(self):
        self.filled, self.read = collections.Counter(), collections.Counter()
        self.under_way = collections.defaultdict(list)

    def note_product(self, thread, slot):
        if thread.warpgroup_id:
            time.sleep(0.002)  # a warpgroup that is late
        self.under_way[int(thread.block_id), int(thread.warpgroup_id)].append(slot)

    def note_wait(self, thread, count):
        products = self.under_way[int(thread.block_id), int(thread.warpgroup_id)]
        while len(products) > count:
            self.read[int(thread.block_id), products.pop(0)] += 1

    def check_fill(self, thread, slot):
        """Before the slot is filled: both warpgroups have read all that was there."""
        own = (int(thread.block_id), slot)
        assert self.read[own] >= COMPUTE * self.filled[own], f"slot {slot} is still read"
        self.filled[own] += 1


def fill_checked(interpreter, eqn, token, get_invals, reads, copy):
    """`copy_gmem_to_smem` in the interpreter; one of x's tiles is counted first."""
    from jax._src import callback
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    if eqn.invars[0].aval.dtype == jnp.bfloat16:
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
        reads.note_product(thread, int(jax.tree.leaves(b_transforms)[0]))
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
        reads = Reads()
        multiply = functools.partialmethod(multiply_registers, reads=reads)
        fill = functools.partialmethod(fill_checked, reads=reads, copy=copy)

        def wait(self, eqn, token, get_invals):
            return called_back(self, token, reads.note_wait, get_invals()[0]), []

        monkeypatch.setattr(interpreter, "_interpret_wgmma_ref_p", multiply)
        monkeypatch.setattr(interpreter, "_interpret_copy_gmem_to_smem_p", fill)
        monkeypatch.setattr(interpreter, "_interpret_inline_mgpu_p", wait)
        monkeypatch.setattr(plgpu, "wgmma_wait", semaphore_call("wait_products"))
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
        (320, 0, {"stages": 3, "group": 1}),
        (64, 0, {}),
        (128, 64, {"stages": 4}),
        (256, 0, {"split": 2}),
        (320, 0, {"wide": True, "stages": 4}),
        (320, 128, {"stages": 3}),
    ],
)
def test_forward(interpreted, k, rank, options):
    rng = np.random.default_rng(k)
    plan = Plan(M, N, k, "bfloat16", True, False, MatmulConfig(rows=64, **options), rank)
    assert plan.grid < plan.work  # blocks go on to further tiles
    x, codes = small(rng, M, k), jnp.asarray(rng.integers(0, 256, (N, k // 2)), jnp.uint8)
    low = (small(rng, M, rank), small(rng, N, rank)) if rank else ()
    module = importlib.import_module("pallas_kernels.nf4_matmul.mosaic_sm90")
    got = interpreted(module, plan, x, *low, codes.reshape(N // 2, k), *[UNUSED] * 5)
    row, step = np.arange(N)[:, None], np.arange(k) // 64
    w = unpacked(np, np.asarray(codes)) * scale_of(row // 128, step, row % 128)
    want = np.asarray(x, np.float32) @ w.T.astype(np.float32)
    if low:
        want += np.asarray(low[0], np.float32) @ np.asarray(low[1], np.float32).T
    if plan.config.split > 1:
        got = got.reshape(plan.config.split, M, N).sum(axis=0)
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_array_equal(got, np.asarray(jnp.asarray(want, jnp.bfloat16), np.float32))


@pytest.mark.parametrize("contracted", [64, 128, 320])
@pytest.mark.parametrize("options", [{"stages": 3}, {"stages": 4, "wide": True}])
def test_dx(interpreted, contracted, options):
    rng = np.random.default_rng(contracted)
    module = importlib.import_module("pallas_kernels.nf4_matmul_transposed.mosaic_sm90")
    plan = module.Plan(M, N, contracted, "bfloat16", True, MatmulConfig(rows=64, **options))
    dy = small(rng, M, contracted)
    codes = jnp.asarray(rng.integers(0, 256, (contracted, N // 2)), jnp.uint8)
    got = interpreted(module, plan, dy, codes, *[UNUSED] * 4)
    row, column = np.arange(contracted)[:, None], np.arange(N)
    # Threads 0 to 63 have the rows in a tile's first 64 columns, the others in its last.
    scale = scale_of(column // 128, row // 64, row % 64 + 64 * (column % 128 // 64))
    want = np.asarray(dy, np.float32) @ (unpacked(np, np.asarray(codes)) * scale).astype(np.float32)
    np.testing.assert_array_equal(got, np.asarray(jnp.asarray(want, jnp.bfloat16), np.float32))


# -- teams -------------------------------------------------------------------------------------


class TeamStandIns(StandIns):
    """Of the team kernel's lane programs. Nothing changes places; weights are `weight_at`'s."""

    def load_share(self, member, column, group, codes, absmax, nested):
        return jnp.zeros((128 * 4,), jnp.uint32)

    def scales_of_share(self, raw, mean):
        return jnp.zeros((128 * 4,), jnp.uint32)

    def store_piece(self, raw, scales, member, column, group, place, room, piece):
        """With the last piece all of the member's share, an even part of the place's rows."""
        if piece < mosaic_team.PIECES - 1:
            return
        high, wide = self.plan.room_shape
        part = high // self.plan.members
        row, col = member * part + jnp.arange(part)[:, None], jnp.arange(wide)
        first = group * mosaic_team.GROUP * 64
        where = (column + col, first + row) if self.plan.transposed else (column + row, first + col)
        room[pl.ds(place * high + member * part, part), :] = weight_at(*where).astype(room.dtype)

    def publish(self):
        pass

    def await_members(self, counted, team, value):
        semaphore_call("wait")(team, value)


def weight_at(output, contracted):
    """A weight of a column of the result."""
    return (3 * output + 5 * contracted) % 7 - 3


class Team:
    """The semaphores of a grid, and how many tiles each block has copied from its team's room."""

    def __init__(self, plan):
        self.plan, self.changed = plan, threading.Condition()
        self.counts, self.copied = collections.Counter(), collections.Counter()
        self.published = collections.Counter()

    def tiles_through(self, number):
        """Tiles of W that a block copies in all of its groups up to the `number`-th."""
        tiles, rest = divmod(number + 1, self.plan.groups)
        steps = tiles * self.plan.steps + min(rest * mosaic_team.GROUP, self.plan.steps)
        return COMPUTE * steps

    def signal(self, block, team, value):
        number, first = self.published[block], team * self.plan.members
        self.published[block] += 1
        for member in range(first, first + self.plan.members):
            gone = number - mosaic_team.ROOM
            assert gone < 0 or self.copied[member] >= self.tiles_through(gone)
        with self.changed:
            self.counts[team] += value
            self.changed.notify_all()
        if block == first:
            time.sleep(0.1)  # a member that is late

    def wait(self, block, team, value):
        with self.changed:
            assert self.changed.wait_for(lambda: self.counts[team] >= value, timeout=120)


class Semaphores:
    """One is known by its number."""

    @property
    def at(self):
        return self

    def __getitem__(self, number):
        return number


def semaphore_call(name):
    """A call of `Team`'s method of this name, or a wait for products, as the interpreter meets it;
    its own `wgmma_wait` does nothing."""

    def call(team, value=0, **_):
        def emit(context, team, value):
            raise AssertionError("never lowered")

        emit.__name__ = name
        splat = plgpu.Layout.WG_SPLAT
        plgpu.inline_mgpu(arg_types=(splat, splat))(emit)(jnp.int32(team), jnp.int32(value))

    return call


def called_back(interpreter, token, function, *arguments):
    """`function(block, *arguments)` of integers, in the order of the token."""
    from jax._src import callback
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    def call(token, thread, *arguments):
        function(thread, *map(int, arguments))
        return token

    return callback.io_callback(
        gpu_callbacks.fail_on_exception(call),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        *(token, interpreter.thread, *arguments),
    )


@pytest.fixture
def team_interpreted(monkeypatch):
    """(plan, operands) -> the team kernel's result, its blocks side by side."""
    from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret, params

    interpreter = jaxpr_interpret.JaxprInterpreter
    copy = interpreter._interpret_copy_gmem_to_smem_p
    multiply = interpreter._interpret_wgmma_ref_p
    whole = mosaic_team.plgpu.kernel

    def as_cluster(body, *, grid, grid_names, **options):
        return whole(body, cluster=grid, cluster_names=grid_names, **options)

    def run(plan, *operands):
        reads, team = Reads(), Team(plan)

        def meet(self, eqn, token, get_invals):
            name = eqn.params["mgpu_fn"].__name__
            if name == "wait_products":
                return called_back(self, token, reads.note_wait, get_invals()[0]), []
            act = getattr(team, name)

            def met(thread, *arguments):
                act(int(thread.block_id), *arguments)

            return called_back(self, token, met, *get_invals()[:2]), []

        def fill(self, eqn, token, get_invals):
            values, trees = get_invals(), eqn.params
            before = 3 + trees["src_transforms_treedef"].num_leaves

            def of_x(thread, slot):
                reads.check_fill(thread, slot)

            def of_room(thread):
                team.copied[int(thread.block_id)] += 1

            source = eqn.invars[0].aval.shape
            if source == (plan.teams * mosaic_team.ROOM * plan.room_shape[0], plan.room_shape[1]):
                token = called_back(self, token, of_room)
            elif source[0] == plan.m:
                token = called_back(self, token, of_x, values[before])
            return copy(self, eqn, token, get_invals)

        def product(self, eqn, token, get_invals):
            token, out = multiply(self, eqn, token, get_invals)
            slot = get_invals()[-1] if eqn.params["b_transforms_tree"] else 0
            return called_back(self, token, reads.note_product, slot), out

        monkeypatch.setattr(interpreter, "_interpret_inline_mgpu_p", meet)
        monkeypatch.setattr(interpreter, "_interpret_copy_gmem_to_smem_p", fill)
        monkeypatch.setattr(interpreter, "_interpret_wgmma_ref_p", product)
        monkeypatch.setattr(arrays, "run", TeamStandIns(plan).run)
        monkeypatch.setattr(mosaic_team.plgpu, "kernel", as_cluster)
        monkeypatch.setattr(plgpu, "semaphore_signal", semaphore_call("signal"))
        monkeypatch.setattr(plgpu, "wgmma_wait", semaphore_call("wait_products"))
        monkeypatch.setattr(pl, "get_global", lambda what: Semaphores())
        with params.force_gpu_interpret_mode():
            return np.asarray(mosaic_team._kernel(plan)(*operands)[0], np.float32)

    return run


@pytest.mark.parametrize(
    ("transposed", "steps", "rank", "stages"),
    [(False, 20, 0, 4), (False, 36, 64, 3), (True, 20, 0, 4)],
)
def test_a_team(team_interpreted, monkeypatch, transposed, steps, rank, stages):
    monkeypatch.setattr(mosaic_team_lanes, "SMS", 4)
    rng = np.random.default_rng(steps)
    m, n, k = 128, 384, 64 * steps
    config = MatmulConfig(rows=64, stages=stages, team=True)
    plan = mosaic_team.Plan(m, n, k, transposed, "bfloat16", True, False, config, rank)
    assert (plan.members, plan.teams, plan.columns) == (2, 2, 3)
    x = small(rng, m, k)
    low = (small(rng, m, rank), small(rng, n, rank)) if rank else ()
    got = team_interpreted(plan, x, *low, *[UNUSED] * 6)
    weight = weight_at(np.arange(n)[:, None], np.arange(k))
    want = np.asarray(x, np.float32) @ weight.T.astype(np.float32)
    if low:
        want += np.asarray(low[0], np.float32) @ np.asarray(low[1], np.float32).T
    np.testing.assert_array_equal(got, np.asarray(jnp.asarray(want, jnp.bfloat16), np.float32))
