"""The real machine: lane programs as MLIR inside a Mosaic GPU kernel.

A machine is made inside a function decorated with `plgpu.inline_mgpu` under *lane* semantics, where
code is emitted once for all threads of the block. Words are `i32`, numbers `f32`. Instructions that
LLVM has no name for are inline PTX; instructions that only compute are left free for LLVM and ptxas
to schedule.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

from pallas_kernels.simt.values import (
    Flag,
    Float,
    Word,
    asm,
    const,
    f32,
    i32,
    i64,
    value_of,
    wrap,
)

POLLS = 1 << 24
"""How often `await_at_least` looks."""


class Machine:
    """Emits the instructions of one thread.

    Args:
        cta: the block's index, an i32.
        shared: the memref of the block's shared memory.
    """

    def __init__(self, cta: ir.Value, shared: ir.Value):
        self.thread = Word(mgpu_utils.thread_idx())
        self.cta = Word(cta)
        self._shared = mgpu_utils.memref_ptr(shared)

    # -- values ---------------------------------------------------------------------------------

    def word(self, value: int) -> Word:
        """A constant word."""
        return Word(const(value, i32()))

    def number(self, value: float) -> Float:
        """A constant float32."""
        return Float(const(float(value), f32()))

    def minimum(self, a: Word, b: int | Word) -> Word:
        """Unsigned minimum."""
        return Word(arith.minui(a.value, value_of(b)))

    def maximum(self, a: Word, b: int | Word) -> Word:
        """Unsigned maximum."""
        return Word(arith.maxui(a.value, value_of(b)))

    def maximum_u16x2(self, a: Word, b: Word) -> Word:
        """Unsigned maximum of each 16-bit half."""
        return Word(*asm("max.u16x2 $0, $1, $2;", [i32()], [a.value, b.value]))

    def where(self, flag: Flag, a: Any, b: Any) -> Any:
        """a where the flag is set, else b."""
        return wrap(arith.select(flag.value, a.value, b.value))

    def as_float(self, word: Word) -> Float:
        """The float32 with these bits."""
        return Float(arith.bitcast(f32(), word.value))

    def as_word(self, number: Float) -> Word:
        """The bits of a float32."""
        return Word(arith.bitcast(i32(), number.value))

    def fma(self, a: Float, b: Float, c: Float) -> Float:
        """a · b + c, rounded once."""
        return Float(llvm.intr_fma(a.value, b.value, c.value))

    def add_unfused(self, product: Float, addend: Float) -> Float:
        """product + addend with the product rounded first."""
        return Float(*asm("add.rn.f32 $0, $1, $2;", [f32()], [product.value, addend.value]))

    def half_pair(self, word: Word) -> tuple[Float, Float]:
        """The two float16 of a word as float32, low half first.

        It stays behind the waits that it follows: a look-up may be under way meanwhile.
        """
        text = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
        low, high = asm(text, [f32()] * 2, [word.value], has_side_effects=True)
        return Float(low), Float(high)

    def pack(self, low: Float, high: Float, dtype: str) -> Word:
        """Two float32 rounded to `dtype` ("bfloat16" or "float16") in one word."""
        kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype]
        text = f"cvt.rn.{kind}.f32 $0, $1, $2;"
        return Word(*asm(text, [i32()], [high.value, low.value]))

    def float_bits(self, number: Float, dtype: str) -> Word:
        """A float32 rounded to `dtype` ("bfloat16", "float16", "float32"), as the low bits."""
        if dtype == "float32":
            return self.as_word(number)
        return self.pack(number, self.number(0.0), dtype)

    def prmt(self, a: Word, b: Word, selector: int | Word) -> Word:
        """PTX `prmt`: byte i of the result is byte `selector[4i:4i+3]` of (b, a).

        Where bit 4i + 3 of the selector is set, it is that byte's sign bit, eight times.
        """
        return Word(
            *asm("prmt.b32 $0, $1, $2, $3;", [i32()], [a.value, b.value, value_of(selector)])
        )

    def anew(self, word: Word) -> Word:
        """The same word, to the compiler another each time: what follows from it is not kept."""
        return Word(*asm("mov.b32 $0, $1;", [i32()], [word.value], has_side_effects=True))

    # -- memory ---------------------------------------------------------------------------------

    def buffer(self, memref: ir.Value) -> ir.Value:
        """A global buffer from its memref."""
        return mgpu_utils.memref_ptr(memref)

    def part(self, buffer: ir.Value, number: Word, nbytes: int) -> ir.Value:
        """The number-th `nbytes` of a buffer, which may be longer than words count."""
        each = arith.constant(i64(), ir.IntegerAttr.get(i64(), nbytes))
        start = arith.muli(arith.extui(i64(), number.value), each)
        return mgpu_utils.getelementptr(buffer, [start], _byte())

    def load(
        self,
        buffer: ir.Value,
        address: Word,
        words: int = 1,
        *,
        offset: int = 0,
        when: Flag | None = None,
    ) -> list[Word]:
        """Aligned words of global memory from byte `address + offset`; undefined unless `when`.

        Not a `.nc` load: ptxas would move those behind a barrier, and they are issued early on
        purpose. Sixteen-byte loads stream past the first-level cache.
        """
        vector = {1: "", 2: ".v2", 4: ".v4"}[words]
        names = ", ".join(f"${i}" for i in range(words))
        names = f"{{{names}}}" if words > 1 else names
        kind = "ld.global.L1::no_allocate" if words == 4 else "ld.global"
        text = f"{kind}{vector}.b32 {names}, [${words}+{offset}];"
        inputs = [self._at(buffer, address)]
        if when is not None:
            text, inputs = f"@${words + 1} {text}", [*inputs, when.value]
        return [Word(v) for v in asm(text, [i32()] * words, inputs, has_side_effects=True)]

    def prefetch(self, buffer: ir.Value, address: Word, nbytes: Word, *, when: Flag) -> None:
        """Ask for bytes of global memory, all at multiples of 16, into the second-level cache."""
        text = "@$2 cp.async.bulk.prefetch.L2.global [$0], $1;"
        asm(text, [], [self._at(buffer, address), nbytes.value, when.value])

    def load_byte(self, buffer: ir.Value, address: Word, *, when: Flag | None = None) -> Word:
        """One byte of global memory as a word."""
        text, inputs = "ld.global.u8 $0, [$1];", [self._at(buffer, address)]
        if when is not None:
            text, inputs = f"@$2 {text}", [*inputs, when.value]
        return Word(*asm(text, [i32()], inputs, has_side_effects=True))

    def store(
        self, buffer: ir.Value, address: Word, value: Word, width: int, *, when: Flag
    ) -> None:
        """Store the low `width` bytes of a word to global memory where `when`."""
        text = {
            4: "@$2 st.global.b32 [$0], $1;",
            2: "{ .reg .b16 h, u; mov.b32 {h, u}, $1; @$2 st.global.b16 [$0], h; }",
        }[width]
        asm(text, [], [self._at(buffer, address), value.value, when.value])

    def store_words(
        self, buffer: ir.Value, address: Word, values: Sequence[Word], *, when: Flag
    ) -> None:
        """Store 2 or 4 aligned words to global memory where `when`."""
        names = ", ".join(f"${i + 1}" for i in range(len(values)))
        text = f"@${len(values) + 1} st.global.v{len(values)}.b32 [$0], {{{names}}};"
        asm(text, [], [self._at(buffer, address), *(v.value for v in values), when.value])

    def shared_load(
        self,
        address: Word,
        words: int = 1,
        *,
        offset: int = 0,
        when: Flag | None = None,
        region: ir.Value | None = None,
    ) -> list[Word]:
        """`words` aligned words of shared memory, of another region than the machine's if given.

        Zeros unless `when`, and then no access to memory.
        """
        if when is not None:
            return self._shared_load_when(address, words, offset, when, region)
        pointer = self._shared_at(address, offset, region)
        if words == 1:
            return [Word(llvm.load(i32(), pointer, alignment=4))]
        vector = llvm.load(ir.VectorType.get((words,), i32()), pointer, alignment=4 * words)
        return [Word(llvm.extractelement(vector, const(i, i32()))) for i in range(words)]

    def _shared_load_when(
        self, address: Word, words: int, offset: int, when: Flag, region: ir.Value | None
    ) -> list[Word]:
        start = llvm.ptrtoint(i32(), self._shared_at(address, 0, region))
        vector = {1: "", 2: ".v2", 4: ".v4"}[words]
        names = ", ".join(f"${i}" for i in range(words))
        zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(words))
        names = f"{{{names}}}" if words > 1 else names
        text = f"{zeros} @${words + 1} ld.shared{vector}.b32 {names}, [${words}+{offset}];"
        # It reads memory, so it must stay where it is; its outputs are written before its inputs
        # are read.
        flags = {"has_side_effects": True, "early_clobber": True}
        return [Word(v) for v in asm(text, [i32()] * words, [start, when.value], **flags)]

    def shared_load_byte(
        self, address: Word, *, offset: int = 0, region: ir.Value | None = None
    ) -> Word:
        """One byte of shared memory as a word."""
        byte = llvm.load(_byte(), self._shared_at(address, offset, region), alignment=1)
        return Word(arith.extui(i32(), byte))

    def shared_store(
        self,
        address: Word,
        values: Sequence[Word | Float],
        *,
        offset: int = 0,
        when: Flag | None = None,
        region: ir.Value | None = None,
    ) -> None:
        """Store 1, 2 or 4 words to shared memory, where `when`."""
        vector = {1: "", 2: ".v2", 4: ".v4"}[len(values)]
        names = ", ".join(f"${i + 1}" for i in range(len(values)))
        names = f"{{{names}}}" if len(values) > 1 else names
        text = f"st.shared{vector}.b32 [$0+{offset}], {names};"
        start = llvm.ptrtoint(i32(), self._shared_at(address, 0, region))
        inputs = [start, *(v.value for v in values)]
        if when is not None:
            text, inputs = f"@${len(inputs)} {text}", [*inputs, when.value]
        asm(text, [], inputs)

    def _at(self, buffer: ir.Value, address: Word) -> ir.Value:
        wide = arith.extui(i64(), address.value)
        return llvm.ptrtoint(i64(), mgpu_utils.getelementptr(buffer, [wide], _byte()))

    def _shared_at(self, address: Word, offset: int, region: ir.Value | None) -> ir.Value:
        base = self._shared if region is None else region
        pointer = mgpu_utils.getelementptr(base, [address.value], _byte())
        return mgpu_utils.getelementptr(pointer, [offset], _byte()) if offset else pointer

    # -- the warp and the block -------------------------------------------------------------------

    def shuffle_xor(self, value: Any, mask: int) -> Any:
        """The value of lane `lane ^ mask`."""
        return type(value)(mgpu_utils.shfl_bfly(value.value, mask))

    def barrier(self) -> None:
        """Shared memory written by the block before is read by it after."""
        gpu.barrier()

    # What follows is between blocks of threads, of which the emulation has one.

    def warpgroup_barrier(self) -> None:
        """The warpgroup's threads wait for each other."""
        mgpu_utils.warpgroup_barrier()

    def copies_see_memory(self) -> None:
        """Order what this thread has stored to global memory, or learnt that others have, before
        what the copy engine reads of it."""
        asm("fence.proxy.async.global;", [], [])

    def await_at_least(self, buffer: ir.Value, address: Word, value: Word) -> None:
        """Wait until a word of global memory is as large, and see what was stored before it was.

        It ends with a trap after `POLLS` looks, some ten seconds: an error is better than a program
        that hangs.
        """
        text = f"""{{
            .reg .pred there;
            .reg .b32 seen, looks;
            mov.b32 looks, 0;
        look:
            ld.acquire.gpu.global.b32 seen, [$0];
            setp.ge.u32 there, seen, $1;
            @there bra done;
            add.u32 looks, looks, 1;
            setp.lt.u32 there, looks, {POLLS};
            @there bra look;
            trap;
        done:
            bar.warp.sync 0xffffffff;
        }}"""
        asm(text, [], [self._at(buffer, address), value.value])

    def mma(
        self, c: Sequence[Float], a: Sequence[Word], b: Sequence[Word], dtype: str
    ) -> list[Float]:
        """mma.m16n8k16, `dtype` inputs and float32 sums: c + A · B over the warp's fragments."""
        kind = {"float16": "f16", "bfloat16": "bf16"}[dtype]
        text = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        )
        inputs = [v.value for v in (*a, *b, *c)]
        return [Float(v) for v in asm(text, [f32()] * 4, inputs, has_side_effects=True)]

    def loop(
        self,
        count: int | Word,
        body: Callable[[Word, list], list],
        carry: Sequence[Word | Float],
    ) -> list:
        """carry = body(i, carry) for i in range(count); `count` is the same for the whole block."""
        index = ir.IndexType.get()
        stop = arith.index_cast(index, value_of(count))
        zero, one = (arith.constant(index, ir.IntegerAttr.get(index, i)) for i in (0, 1))
        loop = scf.ForOp(zero, stop, one, [v.value for v in carry])
        with ir.InsertionPoint(loop.body):
            i = Word(arith.index_cast(i32(), loop.induction_variable))
            made = body(i, [wrap(v) for v in loop.inner_iter_args])
            scf.yield_([v.value for v in made])
        return [wrap(v) for v in loop.results]


def _byte() -> ir.Type:
    return ir.IntegerType.get_signless(8)
