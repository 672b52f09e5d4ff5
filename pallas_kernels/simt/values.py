"""What a lane program computes with, as MLIR: words, float32 numbers and flags, one per thread."""

from collections.abc import Callable, Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


def i32() -> ir.Type:
    """The type of a word."""
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    """The type of an address."""
    return ir.IntegerType.get_signless(64)


def f32() -> ir.Type:
    """The type of a number."""
    return ir.F32Type.get()


def const(value: int | float, type_: ir.Type) -> ir.Value:
    """A constant; words of 2³¹ and more are their signed twins."""
    if isinstance(value, float):
        return arith.constant(type_, ir.FloatAttr.get(type_, value))
    if value >= 1 << 31:
        value -= 1 << 32
    return arith.constant(type_, ir.IntegerAttr.get(type_, value))


class Flag:
    """One bit per thread."""

    def __init__(self, value: ir.Value):
        self.value = value

    def __and__(self, other: "Flag") -> "Flag":
        return Flag(arith.andi(self.value, other.value))


def _compare(kind: arith.CmpIPredicate) -> Callable[["Word", "int | Word"], Flag]:
    return lambda self, other: Flag(arith.cmpi(kind, self.value, value_of(other)))


class Word:
    """An unsigned 32-bit integer per thread."""

    def __init__(self, value: ir.Value):
        self.value = value

    def __add__(self, other: "int | Word") -> "Word":
        return Word(arith.addi(self.value, value_of(other)))

    def __sub__(self, other: "int | Word") -> "Word":
        return Word(arith.subi(self.value, value_of(other)))

    def __rsub__(self, other: int) -> "Word":
        return Word(arith.subi(value_of(other), self.value))

    def __mul__(self, other: "int | Word") -> "Word":
        return Word(arith.muli(self.value, value_of(other)))

    def __floordiv__(self, other: "int | Word") -> "Word":
        return Word(arith.divui(self.value, value_of(other)))

    def __mod__(self, other: "int | Word") -> "Word":
        return Word(arith.remui(self.value, value_of(other)))

    def __and__(self, other: "int | Word") -> "Word":
        return Word(arith.andi(self.value, value_of(other)))

    def __or__(self, other: "int | Word") -> "Word":
        return Word(arith.ori(self.value, value_of(other)))

    def __xor__(self, other: "int | Word") -> "Word":
        return Word(arith.xori(self.value, value_of(other)))

    def __lshift__(self, other: "int | Word") -> "Word":
        return Word(arith.shli(self.value, value_of(other)))

    def __rshift__(self, other: "int | Word") -> "Word":
        return Word(arith.shrui(self.value, value_of(other)))

    __radd__, __rmul__ = __add__, __mul__
    __lt__ = _compare(arith.CmpIPredicate.ult)
    __ge__ = _compare(arith.CmpIPredicate.uge)
    __eq__ = _compare(arith.CmpIPredicate.eq)  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class Float:
    """A float32 per thread."""

    def __init__(self, value: ir.Value):
        self.value = value

    def __add__(self, other: "Float") -> "Float":
        return Float(arith.addf(self.value, other.value))

    def __mul__(self, other: "Float") -> "Float":
        return Float(arith.mulf(self.value, other.value))


def value_of(operand: "int | Word") -> ir.Value:
    """The i32 of a word, or of a constant."""
    return operand.value if isinstance(operand, Word) else const(operand, i32())


def wrap(value: ir.Value) -> Word | Float:
    """An i32 or f32 as what programs compute with."""
    return Float(value) if value.type == f32() else Word(value)


def asm(text: str, outputs: Sequence[ir.Type], inputs: Sequence[ir.Value], **flags: bool) -> list:
    """Inline PTX; `$0 …` are the outputs, then the inputs."""

    def letter(t):
        return {"i32": "r", "f32": "f", "i1": "b", "i64": "l"}.get(str(t), "l")

    out = "=&" if flags.get("early_clobber") else "="
    constraints = [f"{out}{letter(t)}" for t in outputs] + [letter(v.type) for v in inputs]
    result = ir.Type.parse("!llvm.void")
    if outputs:
        result = outputs[0] if len(outputs) == 1 else llvm.StructType.get_literal(list(outputs))
    made = llvm.inline_asm(
        result,
        list(inputs),
        text,
        ",".join(constraints),
        has_side_effects=flags.get("has_side_effects", not outputs),
    )
    if len(outputs) < 2:
        return [made] if outputs else []
    return [llvm.extractvalue(t, made, [i]) for i, t in enumerate(outputs)]
