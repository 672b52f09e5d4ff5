"""The largest that fits, in few compiles.

A step's bytes are close to a line in the batch, and in the sequence where attention is linear in
memory. So: the plan at hand and one more point, a line through them, one compile where the line
meets the limit; and if that was too much or too little, again through the two nearest points.
"""

from collections.abc import Callable, Mapping


def largest_that_fits(
    bytes_at: Callable[[int], int],
    limit: int,
    *,
    start: int = 1,
    step: int = 1,
    most: int = 2**20,
    known: Mapping[int, int] | None = None,
    second: int | None = None,
    compiles: int = 3,
) -> int | None:
    """The largest n = start, start + step, ... up to `most` at which `bytes_at(n)` is within limit.

    Args:
        bytes_at: n -> bytes, rising with n; each call is a compile.
        limit: bytes.
        start: the smallest n of interest.
        step: n is start plus a multiple of it.
        most: where the search ends.
        known: points that were compiled before.
        second: where to look first beyond them: best near the answer, and a guess will do.
        compiles: how often `bytes_at` may be called. What is returned was always compiled and fits;
            where this number ran out, a larger n may fit too.

    Returns:
        n, or None where not even `start` fits, or is beyond `most`.
    """
    if most < start:
        return None
    last = start + (most - start) // step * step
    found = {n: size for n, size in (known or {}).items() if start <= n <= last}
    asked = 0

    def ask(n: int) -> None:
        nonlocal asked
        found[n] = bytes_at(n)
        asked += 1

    if not any(size <= limit for size in found.values()):
        ask(start)
        if found[start] > limit:
            return None
    guess = start + (max(second or 0, max(found) + step) - start) // step * step
    while asked < compiles:
        fitting = max(n for n in found if found[n] <= limit)
        # A steep piece of a curve that is no line can make a larger n look smaller: not a limit.
        too_large = min((n for n in found if n > fitting), default=last + step)
        if too_large <= fitting + step:
            break
        ask(min(max(guess, fitting + step), too_large - step))
        guess = _meets(found, limit, start, step, last)
    return max(n for n in found if found[n] <= limit)


def _meets(found: Mapping[int, int], limit: int, start: int, step: int, last: int) -> int:
    """Where the line through the two nearest points meets the limit, rounded down to a multiple."""
    fitting = max(n for n in found if found[n] <= limit)
    above = [n for n in found if n > fitting]
    below = [n for n in found if n < fitting]
    if not (above or below):
        return fitting + step
    low, high = (fitting, min(above)) if above else (max(below), fitting)
    slope = (found[high] - found[low]) / (high - low)
    reach = last if slope <= 0 else low + (limit - found[low]) / slope
    return start + int(min(reach, last) - start) // step * step
