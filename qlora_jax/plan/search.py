"""The largest that fits, in few compiles.

A step's bytes are close to a line in the batch, and in the sequence where attention is linear in
memory. So: two points, a line through them, one compile where the line meets the limit, and again
through the two nearest points until the answer is verified on both sides, or near enough.
"""

from collections.abc import Callable


def largest_that_fits(
    bytes_at: Callable[[int], int],
    limit: int,
    *,
    start: int = 1,
    step: int = 1,
    most: int = 2**20,
    compiles: int = 5,
) -> int | None:
    """The largest n = start, start + step, ... up to `most` at which `bytes_at(n)` is within limit.

    Args:
        bytes_at: n -> bytes, rising with n; each call is a compile.
        limit: bytes.
        start: the smallest n of interest.
        step: n is start plus a multiple of it.
        most: where the search ends.
        compiles: how often `bytes_at` may be called. What is returned was always compiled and fits;
            where this number ran out, a larger n may fit too.

    Returns:
        n, or None where not even `start` fits.
    """
    known = {start: bytes_at(start)}
    if known[start] > limit:
        return None
    last = start + (most - start) // step * step
    guess = min(start + step, last)
    while guess not in known and len(known) < compiles:
        known[guess] = bytes_at(guess)
        fitting = max(n for n in known if known[n] <= limit)
        # A steep piece of a curve that is no line can make a larger n look smaller: not a limit.
        too_large = min((n for n in known if known[n] > limit), default=last + step)
        low, high = _nearest_two(known, fitting, too_large)
        slope = (known[high] - known[low]) / (high - low)
        reach = last if slope <= 0 else low + (limit - known[low]) / slope
        guess = start + int(min(reach, last) - start) // step * step
        guess = min(max(guess, fitting + step), too_large - step)
        if too_large == fitting + step:
            break
    return max(n for n in known if known[n] <= limit)


def _nearest_two(known: dict[int, int], fitting: int, too_large: int) -> tuple[int, int]:
    """The two known points between which, or beyond which, the limit lies."""
    if too_large in known:
        return fitting, too_large
    below = [n for n in known if n < fitting]
    return max(below), fitting
