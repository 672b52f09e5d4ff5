"""How fast could this kernel run on that card? An answer from its machine code, with no card.

    python -m benchmarks.kernel_model --card h200 --op matmul --rows 1 --shape 7b-qkvo
    python -m benchmarks.kernel_model --op matmul transposed --rows 4096 --implementation mosaic_gpu
    python -m benchmarks.kernel_model --implementation mosaic_gpu --config '{"selects": 2}'

A kernel is bound by the busiest of a few things, each of which has a rate: bytes from memory, FLOP
on the tensor cores, and lane-instructions on each unit of a multiprocessor (float, integer, shared
memory, …) and on its four schedulers. The compiler's SASS says how many instructions of each kind
the hot loop holds; the tile sizes say how many weights one turn of that loop decodes; so we know
the lane-instructions per weight, and from the card's clock and cores the time each unit needs.

The prediction is the largest of these times, as if all units overlapped perfectly, stretched by
the last wave's idle cores. It is a floor for *this code*: a measurement above it has latency,
conflicts or launch gaps to explain; one below it refutes the model. docs/kernels.md keeps the log.

Rates: CUDA programming guide, "Throughput of native arithmetic instructions".
"""

import argparse
import collections
import dataclasses
import json
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks._autotune import TUNED, dispatch_op
from benchmarks._points import SHAPES, Point
from benchmarks._programs import make_input, op_function, packed_weight
from pallas_kernels import compile_for, configs_to_try, dispatch
from pallas_kernels._arguments import Layout
from pallas_kernels._mosaic import BLOCK, SMS
from pallas_kernels._table import config_type
from pallas_kernels._triton_config import TritonConfig
from pallas_kernels.cards import CARDS, Card
from pallas_kernels.dispatch import MAX_ROWS
from pallas_kernels.nf4_gemv import mosaic_plan as gemv_plan
from pallas_kernels.nf4_matmul import mosaic_plan as matmul_plan
from pallas_kernels.nf4_matmul.mosaic_plan import COMPUTE

UNITS = ("float", "integer", "multiply", "convert", "shared", "global", "issue")
"""`multiply` is IMAD, which runs beside the other integer work, on float lanes."""

_UNIT_OF = (
    ("tensor", r"[HIBQ]G?MMA|WGMMA|UTC\w*MMA"),
    ("float", r"F(?:FMA|MUL|ADD|SWZADD)|H(?:FMA2|MUL2|ADD2|SET2|SETP2)|FFMA2"),
    ("multiply", r"IMAD"),
    ("convert", r"MUFU|I2F\w*|F2I\w*|F2F|FRND|POPC|FLO|BREV"),
    ("shared", r"LDS\w*|STS\w*|LDSM|STSM|ATOMS|SHFL|MOVM"),
    ("global", r"LDG\w*|STG\w*|LDL|STL|LD|ST|ATOM\w*|RED\w*|UBLKCP|UTMA\w*"),
    ("control", r"BRA|EXIT|BAR|BSSY|BSYNC|NOP|WARPSYNC|SYNCS|DEPBAR\w*|LDGDEPBAR|ERRBAR|CALL|RET"),
    ("uniform", r"U[A-Z0-9]+|R2UR|S2UR|CS2UR|VOTEU"),
)
"""unit -> opcodes, first match wins; what matches none is integer work (LOP3, SHF, PRMT, …)."""

_FLOAT_LANES = {(7, 5): 64, (8, 0): 64}  # of 128 elsewhere


@dataclasses.dataclass(frozen=True)
class LoopCount:
    """Warp-instructions of one turn of the hot loop (or of a kernel without loops)."""

    opcodes: dict[str, int]
    units: dict[str, float]
    """Issue slots per unit; wide loads count as often as they move 4 bytes per lane."""
    instructions: int
    is_loop: bool
    vector_loads: int
    """16-byte loads from device memory."""


_LINE = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?(?P<op>[A-Z][\w.]*)(?P<rest>[^;]*)"
)
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_BRANCH = re.compile(r"BRA[\w.]*\s+.*?`\((\.L_\w+)\)")


def count_hot_loop(sass: str) -> LoopCount:
    """Count the instructions of the largest innermost loop, or of everything before EXIT.

    Of warps with roles, those that multiply: a loop with tensor instructions comes before others.
    """
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif match := _LINE.search(line):
            code.append((match["op"], match["rest"]))
            branch = _BRANCH.search(line)
            # Code ends in a branch to itself, which is no loop.
            if branch and labels.get(branch[1], len(code)) < len(code) - 1:
                loops.append((labels[branch[1]], len(code)))
    innermost = [
        loop
        for loop in loops
        if not any(other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in loops)
    ]
    is_loop = bool(innermost)
    if is_loop:

        def weight(loop: tuple[int, int]) -> tuple[bool, int]:
            body = (opcode for opcode, _ in code[slice(*loop)])
            return any(unit_of(opcode) == "tensor" for opcode in body), loop[1] - loop[0]

        begin, end = max(innermost, key=weight)
    else:
        exits = [i for i, (op, _) in enumerate(code) if op.startswith("EXIT")]
        begin, end = 0, (exits[-1] if exits else len(code))
    return _tally(code[begin:end], is_loop)


def unit_of(opcode: str) -> str:
    """The unit that runs an opcode ("LDS.64" -> "shared")."""
    name = opcode.split(".")[0]
    return next((u for u, pattern in _UNIT_OF if re.fullmatch(pattern, name)), "integer")


def _tally(body: Sequence[tuple[str, str]], is_loop: bool) -> LoopCount:
    opcodes: collections.Counter[str] = collections.Counter()
    units: dict[str, float] = collections.defaultdict(float)
    vector_loads = 0
    for opcode, operands in body:
        opcodes[opcode] += 1
        unit = unit_of(opcode)
        width = 1.0
        if unit in ("shared", "global"):
            bits = re.search(r"\.(64|128)\b", opcode)
            width = int(bits[1]) / 32 if bits else 1.0
            vector_loads += unit == "global" and width == 4 and opcode.startswith("LDG")
        units[unit] += width
        if tile := re.match(r"HGMMA\.64x(\d+)x16\b", opcode):
            # Its right operand: 32 bytes a column, for the four warps together. Its left one, 64
            # rows of as many, if it is in shared memory too: one descriptor says where both are.
            from_shared = operands.split(",")[1].strip().startswith("gdesc")
            units["shared"] += (int(tile[1]) + 64 * from_shared) / 16
    return LoopCount(dict(opcodes), dict(units), len(body), is_loop, vector_loads)


def occupancy(card: Card, kernel: compile_for.KernelCode) -> int:
    """Thread blocks that one multiprocessor holds at a time."""
    core = card.multiprocessor
    limits = [32, core.threads // kernel.threads]
    if kernel.registers:
        # Registers are handed out to a warp in units of 256.
        per_warp = -(-kernel.registers * 32 // 256) * 256
        limits.append(core.registers // (per_warp * -(-kernel.threads // 32)))
    if kernel.smem:
        limits.append(core.smem // (kernel.smem + 1024))
    return max(1, min(limits))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds per call that each resource needs; the largest, stretched by `waves`, is the time."""

    seconds: dict[str, float]
    per_weight: dict[str, float]
    """Lane-instructions per decoded weight."""
    blocks_per_core: int
    waves: float
    """Time of whole waves over time of the work spread evenly: 1 is perfect."""
    loop: LoopCount

    @property
    def bound(self) -> str:
        """What the kernel waits for."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def total(self) -> float:
        """Predicted seconds per call."""
        return self.seconds[self.bound] * self.waves


def predict(
    card: Card, kernel: compile_for.KernelCode, point: Point, weights_per_turn: float, passes: int
) -> Prediction:
    """Model one kernel, all of whose threads run its hot loop.

    Args:
      card: whose clock, cores and rates count.
      kernel: with SASS, from `compile_for.inspect_kernels`.
      point: what it computes: its bytes and FLOP.
      weights_per_turn: weights that one thread block decodes in one turn of its hot loop.
      passes: how often each weight is decoded (once per tile of rows).

    Raises ValueError where no disassembler was found.
    """
    loop = hot_loop(kernel)
    per_weight = lanes_per_weight(loop, kernel.threads, weights_per_turn)
    blocks = occupancy(card, kernel)
    grid = math.prod(kernel.grid) or 1
    at_once = blocks * card.cores
    waves = math.ceil(grid / at_once) / (grid / at_once) if grid > at_once else 1.0
    if grid < card.cores:
        waves = card.cores / grid
    seconds = floors(card, point, per_weight, passes, tensor="tensor" in loop.units)
    return Prediction(seconds, per_weight, blocks, waves, loop)


def hot_loop(kernel: compile_for.KernelCode) -> LoopCount:
    """The kernel's hot loop, counted; a ValueError where no disassembler was found."""
    if kernel.sass is None:
        raise ValueError(
            "the kernel has no SASS: install the wheels nvidia-cuda-nvcc and nvidia-cuda-nvdisasm"
        )
    return count_hot_loop(kernel.sass)


def lanes_per_weight(loop: LoopCount, lanes: int, weights: float) -> dict[str, float]:
    """Lane-instructions per weight, by unit, where so many lanes decode so many in a turn."""
    slots = loop.units | {"issue": loop.instructions}
    return {unit: count * lanes / weights for unit, count in slots.items()}


def floors(
    card: Card, point: Point, per_weight: dict[str, float], passes: int, tensor: bool
) -> dict[str, float]:
    """Seconds per call that each resource needs, from the lane-instructions per weight.

    Shared memory and the first-level cache are one unit to the data that they carry, "load path".
    """
    load_path = per_weight.get("shared", 0.0) + per_weight.get("global", 0.0)
    per_weight = per_weight | {"load path": load_path}
    float_lanes = _FLOAT_LANES.get(card.compute_capability, 128)
    rates = {"float": float_lanes, "integer": 64, "multiply": 64, "convert": 16, "issue": 128}
    rates |= {"shared": 32, "global": 32, "load path": 32}
    decoded = point.size * passes
    per_second = card.cores * card.clock_ghz * 1e9
    seconds = {
        unit: per_weight.get(unit, 0.0) * decoded / (rate * per_second)
        for unit, rate in rates.items()
    }
    seconds["memory"] = point.bytes / card.bandwidth
    if point.op != "dequantize" and tensor:
        seconds["tensor"] = point.flops / card.matmul_flops
    return seconds


def predict_mosaic(card: Card, kernel: compile_for.KernelCode, point: Point) -> Prediction:
    """Model a Hopper kernel: one persistent block a multiprocessor, whose warps have roles.

    Its tensor instructions say how many weights a warp decodes in a turn: the weights are their
    register operand, 16 × 16 of an `HMMA` and, by the four warps of a group, 64 × 16 of an `HGMMA`.
    """
    loop = hot_loop(kernel)
    many = sum(count for name, count in loop.opcodes.items() if name.startswith("HGMMA"))
    few = sum(count for name, count in loop.opcodes.items() if name.startswith("HMMA"))
    passes, spread = mosaic_split(point)
    # Of few rows, several share an instruction; more rows multiply the same weights again.
    per_weight = lanes_per_weight(loop, 32, 256 * (many or few / _gemv_plan(point).products))
    seconds = floors(card, point, per_weight, passes, tensor=True)
    return Prediction(seconds, per_weight, 1, spread, loop)


def mosaic_split(point: Point) -> tuple[int, float]:
    """(times each weight is decoded, the busiest multiprocessor's share over an even one)."""
    if point.op != "transposed" and point.rows <= MAX_ROWS:
        return 1, 1 / _gemv_plan(point).efficiency
    config, (passes, columns) = _matmul_tiles(point)
    work = config.split * passes * columns
    at_once = SMS // passes * passes if config.team else SMS
    return passes, -(-work // at_once) / (work / SMS)


def _gemv_plan(point: Point) -> gemv_plan.Plan:
    config = point.config or gemv_plan.choose_config(point.rows, point.n, point.k)
    assert isinstance(config, gemv_plan.GemvConfig)
    return gemv_plan.Plan(point.rows, point.n, point.k, "bfloat16", True, False, config)


def _matmul_tiles(point: Point) -> tuple[matmul_plan.MatmulConfig, tuple[int, int]]:
    """How a Hopper matmul is cut, and its tiles along rows and columns."""
    back = point.op == "transposed"
    config = point.config or matmul_plan.choose_config(point.rows, transposed=back)
    assert isinstance(config, matmul_plan.MatmulConfig)
    columns = point.k if back else point.n
    return config, matmul_plan.tiles_of(config, point.rows, columns)


def cache_bytes(point: Point) -> int:
    """What a Hopper matmul's blocks fetch of x and of codes, or as a team of decoded weights,
    wherever the cache has it from."""
    config, (passes, columns) = _matmul_tiles(point)
    x = config.rows * BLOCK * 2
    weights = COMPUTE * BLOCK * BLOCK * 2 // (1 if config.team else 4)
    steps = (point.n if point.op == "transposed" else point.k) // BLOCK
    return passes * columns * steps * (x + weights)


def tile(config: TritonConfig, point: Point, grid: int) -> tuple[float, int]:
    """(weights a block decodes per turn of its loop, times each weight is decoded)."""
    if point.op == "dequantize":
        return point.size / grid, 1
    passes = math.ceil(point.rows / config.block_m) if config.block_m > 1 else 1
    return config.block_n * config.block_k, passes


def model_point(card: Card, point: Point) -> tuple[compile_for.KernelCode, Prediction]:
    """Compile a point for the card and model its kernel."""
    rows = max(point.rows, 1)
    op = dispatch_op(point.op, rows)
    layout = Layout((point.n, point.k), "nf4", point.blocksize, double_quant=True)
    config = point.config
    if config is None:
        config = dispatch.which_implementation(
            op, rows, layout, implementation=point.implementation, kind=card.pallas_kind
        ).config
    if point.implementation == "mosaic_gpu":
        point = dataclasses.replace(point, config=config)
        kernel = compile_point(card, point)
        return kernel, predict_mosaic(card, kernel, point)
    assert isinstance(config, TritonConfig)
    if not config.fused:  # the rule leaves the product to XLA: what is modelled is a kernel of ours
        config = configs_to_try(op, rows, point.n, point.k)[0]
    kernel = compile_point(card, dataclasses.replace(point, config=config))
    weights, passes = tile(config, point, math.prod(kernel.grid))
    prediction = predict(card, kernel, point, weights, passes)
    if not prediction.loop.is_loop and point.op != "dequantize":
        # Without a loop the whole row of tiles is one turn.
        prediction = predict(card, kernel, point, config.block_n * point.k, passes)
    return kernel, prediction


def compile_point(card: Card, point: Point) -> compile_for.KernelCode:
    """The point's own kernel, compiled for the card."""
    weight = jax.eval_shape(
        lambda: packed_weight(jax.random.key(0), point.n, point.k, point.blocksize)
    )
    x = jax.eval_shape(lambda: make_input(point, 0))
    run = op_function(point, interpret=False)
    _, kernels = compile_for.inspect_kernels(card, run, x, *weight, sass=True)
    return next(kernel for kernel in kernels if kernel.name.startswith("nf4_"))


def describe(card: Card, point: Point, kernel: Any, prediction: Prediction) -> str:
    """The model's account of one kernel, a few lines."""
    per_weight = ", ".join(
        f"{unit} {prediction.per_weight[unit]:.2f}"
        for unit in (*UNITS, "tensor")
        if prediction.per_weight.get(unit)
    )
    floors = ", ".join(
        f"{name} {seconds * 1e6:.2f}"
        for name, seconds in sorted(prediction.seconds.items(), key=lambda item: -item[1])
    )
    where = "hot loop" if prediction.loop.is_loop else "no loop"
    fetched = ""
    if point.implementation == "mosaic_gpu" and point.rows > MAX_ROWS:
        fetched = f", {cache_bytes(point) / 1e9:.2f} GB fetched through the second-level cache"
    return "\n".join(
        [
            f"{point.label} on {card.name}: {prediction.total * 1e6:.2f} us, bound by "
            f"{prediction.bound}, waves {prediction.waves:.2f}",
            f"  floors in us: {floors}",
            f"  lane-instructions per weight ({where} of {prediction.loop.instructions}, "
            f"{prediction.loop.vector_loads} 16-byte loads): {per_weight}",
            f"  {kernel.registers} registers x {kernel.threads} threads, {kernel.smem} B shared, "
            f"{prediction.blocks_per_core} blocks per core, spills {kernel.spill_bytes} B"
            f"{fetched}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Model the chosen points and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--card", default="h200", choices=sorted(CARDS))
    parser.add_argument("--op", nargs="+", default=["matmul"], choices=TUNED)
    parser.add_argument("--rows", nargs="+", type=int, default=[1])
    parser.add_argument("--shape", nargs="+", default=["7b-qkvo"], choices=sorted(SHAPES))
    parser.add_argument("--implementation", default="triton", choices=["triton", "mosaic_gpu"])
    parser.add_argument("--config", type=json.loads, help="a config of the kernel as JSON")
    options = parser.parse_args(argv)
    card = CARDS[options.card]
    for op in options.op:
        for rows in options.rows if op != "dequantize" else [0]:
            kind = config_type(dispatch_op(op, rows), options.implementation)
            config = kind(**options.config) if options.config else None
            for name in options.shape:
                point = Point(op, options.implementation, rows, name, *SHAPES[name], config=config)
                print(describe(card, point, *model_point(card, point)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
