"""The ring of tiles in shared memory between the Hopper matmuls' warpgroups.

One warpgroup fills its slots, in order, several steps ahead; the computing ones wait for a slot
(`full`), use what is in it and say so (`empty`). A step is 64 of the contracted axis: a tile of x,
codes, and 128 scales, which the feeding warpgroup decodes, one per thread.

What an H200 said of it (docs/kernel_limits.md): the feeding warpgroup must not wait for a load that
it has just issued, so scales are loaded by the group of steps, a group ahead; and shared memory,
which `wgmma` is reading, takes 130 clocks to answer, so codes are read a step before they are
decoded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels._mosaic import BLOCK
from pallas_kernels.codebooks import NESTED_BLOCKSIZE
from pallas_kernels.nf4_matmul.mosaic_plan import COMPUTE, MatmulConfig
from pallas_kernels.nf4_matmul.mosaic_table import look_up_absmax
from pallas_kernels.simt import arrays

GROUP = 4
"""Steps whose scales are loaded at once."""

SCALE_WORDS = 2 * GROUP


# -- what a thread of the feeding warpgroup does ---------------------------------------------------


def load_offset(m, plan, offset):
    """The mean of the absmax constants, and three words that fill up."""
    return m.load(offset, m.word(0)) + [m.word(0)] * 3


def load_scales(m, plan, first, between, blocks, absmax, nested):
    """The thread's raw scales for a group of steps, `SCALE_WORDS` words.

    `first`: its block in the first step; `between`: how many blocks on the next step's is;
    `blocks`: all there are. Past the last, that one: such a scale is not used.
    """
    at = [m.minimum(first + i * between, blocks - 1) for i in range(GROUP)]
    if not plan.double_quant:
        return [w for block in at for w in m.load(absmax, block * 4)] + [m.word(0)] * GROUP
    codes = [m.load_byte(absmax, block) for block in at]
    return codes + [w for block in at for w in m.load(nested, block // NESTED_BLOCKSIZE * 4)]


def store_scale(m, plan, i, words, offset, scales):
    """Decode the scale of the group's step i and put it at the thread's place of 128."""
    scale = m.as_float(words[i])
    if plan.double_quant:
        value = look_up_absmax(m, plan.config, words[i])
        scale = m.fma(value, m.as_float(words[GROUP + i]), m.as_float(offset[0]))
    m.shared_store((m.thread & 127) << 2, [m.as_word(scale)], region=scales)


# -- what a warpgroup does -------------------------------------------------------------------------


def pass_scales(
    plan: Any, table: Any, i: int, words: Any, mean: Any, scales: Any, full: Any
) -> None:
    """Put the scales of a group's step i into its slot, and say so."""
    arrays.run(
        lambda m, w, o, t: store_scale(m, plan, i, w, o, t),
        table,
        [words, mean, arrays.Tile(scales)],
    )
    plgpu.barrier_arrive(full)


def feed(steps: int, load: Callable[[Any], Any], fill: Callable[[Any, Any, int], None]) -> None:
    """`fill(step, words, i)` for each step, the i-th of its group.

    `words` are what `load(first step)` returned for the group, called while the one before is
    filled.
    """

    def group(index: Any, words: Any) -> Any:
        following = load((index + 1) * GROUP)
        for i in range(GROUP):
            fill(index * GROUP + i, words, i)
        return following

    words = lax.fori_loop(0, steps // GROUP, group, load(jnp.int32(0)))
    for i in range(steps % GROUP):
        fill(jnp.int32(steps - steps % GROUP + i), words, i)


def free_slot(config: MatmulConfig, empty: Any, number: Any) -> Any:
    """The slot of the ring's `number`-th filling, once all have done with what was in it."""
    slot = lax.rem(number, config.stages)
    pl.when(number >= config.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
    return slot


class Lanes(NamedTuple):
    """What the threads of a computing warpgroup do with a step, besides multiplying.

    Attributes:
        read: slot -> the step's codes.
        look_up: (slot, codes) -> all that `scale` needs.
        scale: that -> the step's weights, a fragment for `wgmma`.
    """

    read: Callable[[Any], Any]
    look_up: Callable[[Any, Any], Any]
    scale: Callable[[Any], Any]


def multiply_steps(
    config: MatmulConfig,
    steps: int,
    first: Any,
    acc: Any,
    tiles: Any,
    full: Any,
    empty: Any,
    lanes: Lanes,
) -> None:
    """acc += weights · tiles of `steps` steps, whose fillings are numbered from `first`.

    While a step is multiplied the next one is decoded and the codes of the second next are read.
    """

    def after(slot: Any) -> Any:
        # Not a remainder: that would be a division, in the way of every step's first `wgmma`.
        return jnp.where(slot == config.stages - 1, 0, slot + 1)

    def arrived(slot: Any) -> Any:
        plgpu.barrier_wait(full.at[slot])
        return lanes.read(slot)

    def multiply(carry: Any, following: int) -> Any:
        slot, weights, codes = carry
        next_slot = after(slot)
        # A wait for a barrier waits for every read under way. Wide, these are the scales alone.
        if following > 0 and config.wide:
            found = lanes.look_up(next_slot, codes)
        plgpu.wgmma(acc, weights, tiles.at[slot].transpose((1, 0)))
        if following > 0 and not config.wide:
            found = lanes.look_up(next_slot, codes)
        if following > 1:
            codes = arrived(after(next_slot))
        if following > 0:
            weights = lanes.scale(found)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(empty.at[slot])
        return next_slot, weights, codes

    def two(_: Any, carry: Any) -> Any:
        # Two steps a turn: the fragment being decoded must not take the registers of the one in
        # use, or ptxas puts the two in sequence.
        return multiply(multiply(carry, 2), 2)

    slot = lax.rem(first, config.stages)
    codes = arrived(slot)
    weights = lanes.scale(lanes.look_up(slot, codes))
    carry = slot, weights, arrived(after(slot)) if steps > 1 else codes
    odd = steps % 2 if steps > 1 else 0
    if odd:  # before the loop: three steps behind it would take too many registers
        carry = multiply(carry, 2)
    turns = max(steps - 2, 0) // 2
    carry = lax.fori_loop(0, turns, two, carry)
    for following in reversed(range(steps - odd - 2 * turns)):
        carry = multiply(carry, following)


def ring_kernel(
    body: Callable[..., None],
    out: jax.ShapeDtypeStruct,
    *,
    config: MatmulConfig,
    dtype: DTypeLike,
    grid: int,
    codes: Any,
    arrivals: int,
) -> Callable[..., Any]:
    """The kernel whose blocks run `body`, two warpgroups "wg" computing and the third feeding them.

    Behind inputs and output, `body` is given in shared memory: the tables; of each stage a tile of
    x [rows, 64] in `dtype`, codes, and 128 float32 scales; the barriers `full` and `empty`.

    Args:
        body: what a warpgroup of the block "cta" does.
        out: shape and dtype of the result.
        config: how the work is cut.
        dtype: of x.
        grid: blocks.
        codes: the stages' codes, a `plgpu.SMEM`.
        arrivals: what makes a slot full: copies, and the scales.
    """
    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=[
            plgpu.SMEM((config.table_bytes // 4,), jnp.uint32),
            plgpu.SMEM((config.stages, config.rows, BLOCK), dtype, transforms=swizzle),
            codes,
            plgpu.SMEM((config.stages, BLOCK * COMPUTE), jnp.float32),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=config.stages),
        ],
        grid=(grid,),
        grid_names=("cta",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
