"""The NumPy machine: one thread block in lockstep, one array element per thread.

It is a model of what the instructions mean, not of time. Every thread runs every instruction, as in
a kernel whose loops have the same number of turns for the whole block; `m.loop` refuses any other.
"""

from collections.abc import Callable, Sequence

import numpy as np

WARP = 32


class Machine:
    """Emulates `threads` threads of block `cta`; shared memory starts out as noise.

    `asked` keeps of every `prefetch` the first byte and the bytes, by threads that took part.

    Args:
        cta: the block's index in the grid.
        threads: a multiple of 32.
        shared_bytes: the size of the block's shared memory.
    """

    def __init__(self, cta: int, threads: int, shared_bytes: int):
        self.threads = threads
        self.thread = np.arange(threads, dtype=np.uint32)
        self.cta = np.full(threads, cta, np.uint32)
        noise = np.random.default_rng(cta)
        self.shared = noise.integers(0, 256, shared_bytes, dtype=np.uint8)
        self.asked: list[list[tuple[int, int]]] = []

    # -- values ---------------------------------------------------------------------------------

    def word(self, value: int) -> np.ndarray:
        """A constant word."""
        return np.full(self.threads, value, np.uint32)

    def number(self, value: float) -> np.ndarray:
        """A constant float32."""
        return np.full(self.threads, value, np.float32)

    def minimum(self, a: np.ndarray, b: int | np.ndarray) -> np.ndarray:
        """Unsigned minimum."""
        return np.minimum(a, np.asarray(b, np.uint32))

    def maximum(self, a: np.ndarray, b: int | np.ndarray) -> np.ndarray:
        """Unsigned maximum."""
        return np.maximum(a, np.asarray(b, np.uint32))

    def maximum_u16x2(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Unsigned maximum of each 16-bit half."""
        return np.maximum(a.view(np.uint16), b.view(np.uint16)).view(np.uint32)

    def where(self, flag: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a where the flag is set, else b."""
        return np.where(flag, a, b)

    def as_float(self, word: np.ndarray) -> np.ndarray:
        """The float32 with these bits."""
        return np.ascontiguousarray(word).view(np.float32)

    def as_word(self, number: np.ndarray) -> np.ndarray:
        """The bits of a float32."""
        return np.ascontiguousarray(number).view(np.uint32)

    def fma(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """a · b + c, rounded once (up to a double rounding here)."""
        exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
        return exact.astype(np.float32)

    def add_unfused(self, product: np.ndarray, addend: np.ndarray) -> np.ndarray:
        """product + addend with the product rounded first."""
        return product + addend

    def half_pair(self, word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The two float16 of a word as float32, low half first."""
        halves = word.copy().view(np.float16).reshape(-1, 2).astype(np.float32)
        return halves[:, 0].copy(), halves[:, 1].copy()

    def pack(self, low: np.ndarray, high: np.ndarray, dtype: str) -> np.ndarray:
        """Two float32 rounded to `dtype` ("bfloat16" or "float16") in one word."""
        return self.float_bits(low, dtype) | self.float_bits(high, dtype) << 16

    def float_bits(self, number: np.ndarray, dtype: str) -> np.ndarray:
        """A float32 rounded to `dtype` ("bfloat16", "float16", "float32"), as the low bits."""
        if dtype == "float32":
            return self.as_word(number)
        if dtype == "float16":
            with np.errstate(over="ignore"):
                return number.astype(np.float16).view(np.uint16).astype(np.uint32)
        bits = self.as_word(number)
        rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(number), np.uint32(0x7FFF), rounded)

    def prmt(self, a: np.ndarray, b: np.ndarray, selector: int | np.ndarray) -> np.ndarray:
        """PTX `prmt`: byte i of the result is byte `selector[4i:4i+3]` of (b, a).

        Where bit 4i + 3 of the selector is set, it is that byte's sign bit, eight times.
        """
        pool = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], 1)
        selector = np.broadcast_to(np.asarray(selector, np.uint32), (self.threads,))
        out = np.zeros((self.threads, 4), np.uint8)
        for i in range(4):
            which = selector >> np.uint32(4 * i)
            byte = pool[np.arange(self.threads), which & 7]
            out[:, i] = np.where(which & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        return out.view(np.uint32)[:, 0]

    def anew(self, word: np.ndarray) -> np.ndarray:
        """The same word."""
        return word

    # -- memory ---------------------------------------------------------------------------------

    def part(self, buffer: np.ndarray, number: np.ndarray, nbytes: int) -> np.ndarray:
        """The number-th `nbytes` of a buffer; the same number in all threads."""
        (index,) = np.unique(number)
        return _bytes(buffer)[index * nbytes : (index + 1) * nbytes]

    def load(
        self,
        buffer: np.ndarray,
        address: np.ndarray,
        words: int = 1,
        *,
        offset: int = 0,
        when: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """Aligned words of global memory from byte `address + offset`; undefined unless `when`."""
        data = self._gather(_bytes(buffer), address, 4 * words, offset, when)
        return list(data.view(np.uint32).T.copy())

    def prefetch(
        self, buffer: np.ndarray, address: np.ndarray, nbytes: np.ndarray, *, when: np.ndarray
    ) -> None:
        """Ask for bytes of global memory, all at multiples of 16: a line in `asked`, no more."""
        self._where(buffer.nbytes, address, 16, 0, when)
        self._where(buffer.nbytes, address + nbytes - np.uint32(16), 16, 0, when)
        pairs = zip(address[when].tolist(), nbytes[when].tolist(), strict=True)
        self.asked.append(list(pairs))

    def load_byte(
        self, buffer: np.ndarray, address: np.ndarray, *, when: np.ndarray | None = None
    ) -> np.ndarray:
        """One byte of global memory as a word."""
        return self._gather(_bytes(buffer), address, 1, 0, when)[:, 0].astype(np.uint32)

    def store(
        self,
        buffer: np.ndarray,
        address: np.ndarray,
        value: np.ndarray,
        width: int,
        *,
        when: np.ndarray,
    ) -> None:
        """Store the low `width` bytes of a word to global memory where `when`."""
        self._scatter(_bytes(buffer), address, [value], width, 0, when)

    def store_words(
        self,
        buffer: np.ndarray,
        address: np.ndarray,
        values: Sequence[np.ndarray],
        *,
        when: np.ndarray,
    ) -> None:
        """Store 2 or 4 aligned words to global memory where `when`."""
        self._scatter(_bytes(buffer), address, values, 4 * len(values), 0, when)

    def shared_load(
        self,
        address: np.ndarray,
        words: int = 1,
        *,
        offset: int = 0,
        when: np.ndarray | None = None,
        region: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """`words` aligned words of shared memory, of another region than the machine's if given.

        Zeros unless `when`.
        """
        data = self._gather(self._region(region), address, 4 * words, offset, when)
        if when is not None:
            data[~when] = 0
        return list(data.view(np.uint32).T.copy())

    def shared_load_byte(
        self, address: np.ndarray, *, offset: int = 0, region: np.ndarray | None = None
    ) -> np.ndarray:
        """One byte of shared memory as a word."""
        return self._gather(self._region(region), address, 1, offset, None)[:, 0].astype(np.uint32)

    def shared_store(
        self,
        address: np.ndarray,
        values: Sequence[np.ndarray],
        *,
        offset: int = 0,
        when: np.ndarray | None = None,
        region: np.ndarray | None = None,
    ) -> None:
        """Store 1, 2 or 4 words to shared memory, where `when`."""
        self._scatter(self._region(region), address, values, 4 * len(values), offset, when)

    def _region(self, region: np.ndarray | None) -> np.ndarray:
        return self.shared if region is None else _bytes(region)

    def _where(
        self, size: int, address: np.ndarray, width: int, offset: int, when: np.ndarray | None
    ) -> np.ndarray:
        start = address.astype(np.int64) + offset
        active = np.ones(self.threads, bool) if when is None else when
        if (start[active] % width).any():
            raise AssertionError(f"misaligned access of {width} bytes")
        if active.any() and not (start[active].min() >= 0 and start[active].max() + width <= size):
            raise AssertionError(
                f"access at {start[active].max()}, outside a buffer of {size} bytes"
            )
        return np.where(active, start, 0)

    def _gather(
        self,
        buffer: np.ndarray,
        address: np.ndarray,
        width: int,
        offset: int,
        when: np.ndarray | None,
    ) -> np.ndarray:
        start = self._where(buffer.size, address, width, offset, when)
        data = buffer[start[:, None] + np.arange(width)]
        if when is not None:
            data[~when] = 0xFF  # NaN, as any kind of float
        return data

    def _scatter(
        self,
        buffer: np.ndarray,
        address: np.ndarray,
        values: Sequence[np.ndarray],
        width: int,
        offset: int,
        when: np.ndarray | None,
    ) -> None:
        start = self._where(buffer.size, address, width, offset, when)
        data = np.stack(values, 1).astype(np.uint32).view(np.uint8)[:, :width]
        active = slice(None) if when is None else when
        buffer[(start[:, None] + np.arange(width))[active]] = data[active]

    # -- the warp and the block -------------------------------------------------------------------

    def shuffle_xor(self, value: np.ndarray, mask: int) -> np.ndarray:
        """The value of lane `lane ^ mask`."""
        return value[np.arange(self.threads) ^ mask]

    def barrier(self) -> None:
        """Shared memory written by the block before is read by it after."""

    def mma(
        self,
        c: Sequence[np.ndarray],
        a: Sequence[np.ndarray],
        b: Sequence[np.ndarray],
        dtype: str,
    ) -> list[np.ndarray]:
        """mma.m16n8k16, `dtype` inputs and float32 sums: c + A · B over the warp's fragments."""
        lane = np.arange(WARP)
        group, quad = lane // 4, lane % 4
        half = [np.stack(self._halves(v, dtype), -1).reshape(-1, WARP, 2) for v in (*a, *b)]
        warps = self.threads // WARP
        left, right = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
        for i in range(2):
            for part in range(4):
                rows, cols = group + 8 * (part % 2), 2 * quad + i + 8 * (part // 2)
                left[:, rows, cols] = half[part][:, :, i]
            for part in range(2):
                right[:, 2 * quad + i + 8 * part, group] = half[4 + part][:, :, i]
        with np.errstate(invalid="ignore"):
            product = left @ right
        out = []
        for part in range(4):
            rows, cols = group + 8 * (part // 2), 2 * quad + part % 2
            out.append((c[part] + product[:, rows, cols].reshape(-1)).astype(np.float32))
        return out

    def _halves(self, word: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        if dtype == "float16":
            return self.half_pair(word)
        return self.as_float(word << np.uint32(16)), self.as_float(word & np.uint32(0xFFFF0000))

    def loop(
        self,
        count: int | np.ndarray,
        body: Callable[[np.ndarray, list[np.ndarray]], list[np.ndarray]],
        carry: Sequence[np.ndarray],
    ) -> list[np.ndarray]:
        """carry = body(i, carry) for i in range(count); `count` is the same for the whole block."""
        counts = np.unique(np.asarray(count))
        if counts.size != 1:
            raise AssertionError("a loop's count must be the same for the whole block")
        carry = list(carry)
        for i in range(int(counts[0])):
            carry = list(body(self.word(i), carry))
        return carry


def _bytes(buffer: np.ndarray) -> np.ndarray:
    return buffer.reshape(-1).view(np.uint8)
