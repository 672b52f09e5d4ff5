"""A Hopper kernel that only reads, and may start before the one in front of it has ended.

What it takes is the floor of the Hopper gemv, which is launched in the same way.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._mosaic import SHARED_LIMIT, SMS, call
from pallas_kernels.nf4_gemv.mosaic_early import MOST
from pallas_kernels.simt.launch import launch

WARPS, LOADS = 16, 8
THREADS = 32 * WARPS
TURN = 16 * LOADS * THREADS
"""Bytes that a block has under way: eight loads of 16 bytes a thread."""


def read_on_hopper(words: jax.Array, *, early: bool) -> jax.Array:
    """Sums over all the words, a multiple of 4 of them, one sum a thread: [1, threads] int32.

    `early` asks for the first bytes of every block, as the gemv does, before it waits.
    """
    turns = -(-words.nbytes // (SMS * TURN))
    kernel = launch(
        functools.partial(read, words.nbytes, turns),
        jax.ShapeDtypeStruct((1, SMS * THREADS), jnp.int32),
        grid=SMS,
        warps=WARPS,
        # One block to a multiprocessor, as of the gemv: or several kernels would start at once.
        shared_bytes=SHARED_LIMIT // 3 * 2,
        name="read_on_hopper",
        early=functools.partial(ask, words.nbytes, turns) if early else None,
    )
    return call(kernel, words)


def ask(nbytes: int, turns: int, m: Any, words: Any, out: Any) -> None:
    """The lane program that asks for the first of a block's bytes."""
    first = m.cta * (turns * TURN)
    asked = m.minimum(nbytes - first, min(turns * TURN, MOST))
    m.prefetch(words, first, asked, when=(m.thread == 0) & (first < nbytes))


def read(nbytes: int, turns: int, m: Any, words: Any, out: Any) -> None:
    """The lane program that reads: a block a piece of the words, in turns."""
    first = m.cta * (turns * TURN) + m.thread * 16

    def body(turn: Any, carry: list[Any]) -> list[Any]:
        (total,) = carry
        places = [first + turn * TURN + i * (16 * THREADS) for i in range(LOADS)]
        loaded = [(at < nbytes, m.load(words, at, 4, when=at < nbytes)) for at in places]
        for inside, four in loaded:
            for word in four:
                total = total + m.where(inside, word, m.word(0))
        return [total]

    (total,) = m.loop(turns, body, [m.word(0)])
    m.store(out, (m.cta * THREADS + m.thread) * 4, total, 4, when=m.thread < THREADS)
