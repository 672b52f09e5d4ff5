"""The Hopper kernels (Mosaic GPU, wgmma) at Llama's linear shapes, compiled for an H200."""

import concurrent.futures
import itertools
import math
import multiprocessing
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks.kernel_model import count_hot_loop
from pallas_kernels import GemvConfig, nf4_matmul
from pallas_kernels import compile_for as harness
from pallas_kernels._arguments import Layout
from pallas_kernels._mosaic import SMS
from pallas_kernels.cards import CARDS
from pallas_kernels.nf4_gemv.mosaic_plan import Plan, choose_config
from pallas_kernels.nf4_matmul import mosaic_team
from pallas_kernels.nf4_matmul.mosaic_plan import MatmulConfig
from tests.gpu_compile.test_kernels import SHAPES, packed, products_beside_kernels

pytestmark = pytest.mark.skipif(
    not harness.gpu_compiler_available(), reason=f"no GPU compiler here. {harness.PLUGIN_HINT}"
)

WORK = (
    *(("gemv", rows) for rows in (1, 8, 16)),
    *(("matmul", rows) for rows in (64, 4096)),
    ("transposed", 4096),
)
QUICK = {
    ("7b-qkvo", "gemv", 8),
    ("70b-down", "gemv", 1),
    ("70b-down", "gemv", 16),
    ("7b-qkvo", "matmul", 64),
    ("7b-qkvo", "matmul", 4096),
    ("7b-gate", "transposed", 4096),
}
MATRIX = [
    pytest.param(
        name,
        *work,
        id=f"{name}-{work[0]}-{work[1]}",
        marks=() if (name, *work) in QUICK else pytest.mark.slow,
    )
    for name, work in itertools.product(SHAPES, WORK)
]


def kernel_of(op: str):
    # Imported here: it loads Mosaic GPU, which needs the plugin's jaxlib.
    if op == "gemv":
        from pallas_kernels.nf4_gemv.mosaic_sm90 import nf4_gemv_mosaic as kernel
    elif op == "matmul":
        from pallas_kernels.nf4_matmul.mosaic_sm90 import nf4_matmul_mosaic as kernel
    else:
        from pallas_kernels.nf4_matmul_transposed.mosaic_sm90 import (
            nf4_matmul_transposed_mosaic as kernel,
        )
    return kernel


def compiled_for_h200(op, n, k, rows, config=None):
    """The compiled program of the op's kernel alone, and its kernels, checked."""
    layout, kernel = Layout((n, k), "nf4", 64, double_quant=True), kernel_of(op)
    x = jax.ShapeDtypeStruct((rows, n if op == "transposed" else k), jnp.bfloat16)
    after = () if op == "transposed" else (None,)

    def run(x, *weight):
        return kernel(x, *weight, *after, layout=layout, config=config)

    compiled, kernels = harness.inspect_kernels(CARDS["h200"], run, x, *packed(n, k))
    check_kernels(kernels, op)
    return compiled, kernels


@pytest.mark.parametrize(("shape_name", "op", "rows"), MATRIX)
def test_hopper_kernel(shape_name, op, rows):
    n, k = SHAPES[shape_name]
    compiled, _ = compiled_for_h200(op, n, k, rows)
    assert compiled.memory_analysis().temp_size_in_bytes < n * k


@pytest.mark.parametrize(
    ("shape_name", "op", "rows", "rank"),
    [
        ("7b-qkvo", "matmul", 4096, 64),
        pytest.param("7b-gate", "matmul", 4096, 16, marks=pytest.mark.slow),
        ("7b-qkvo", "gemv", 1, 16),
        pytest.param("70b-down", "gemv", 1, 256, marks=pytest.mark.slow),
        pytest.param("7b-qkvo", "gemv", 8, 64, marks=pytest.mark.slow),
        # 20 warps, 96 registers a lane.
        pytest.param("13b-qkvo", "gemv", 8, 64, marks=pytest.mark.slow),
        pytest.param("7b-qkvo", "gemv", 16, 64, marks=pytest.mark.slow),
    ],
)
def test_hopper_kernel_with_an_adapter(shape_name, op, rows, rank):
    """Both products in one kernel, without spilling; the matmul fills the rank up to 64s."""
    n, k = {**SHAPES, "13b-qkvo": (5120, 5120)}[shape_name]
    layout = Layout((n, k), "nf4", 64, double_quant=True)
    kernel = kernel_of(op)

    def run(x, xa, b, *weight):
        return kernel(x, *weight, None, lora=(xa, b), layout=layout)

    x, xa, b = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, k), (rows, rank), (n, rank)))
    compiled, kernels = harness.inspect_kernels(CARDS["h200"], run, x, xa, b, *packed(n, k))
    check_kernels(kernels, op)
    assert not products_beside_kernels(compiled)
    padding = 0 if rank == 64 or op == "gemv" else 2 * 64 * (rows + n)
    assert compiled.memory_analysis().temp_size_in_bytes < padding + 2**20


@pytest.mark.parametrize(
    ("shape_name", "rows"),
    [
        ("7b-qkvo", 1),
        pytest.param("7b-qkvo", 8, marks=pytest.mark.slow),
        pytest.param("70b-down", 1, marks=pytest.mark.slow),
    ],
)
def test_the_gemv_on_a_b200(shape_name, rows):
    """Through the op, by name: Blackwell has what the Hopper gemv needs, and as many registers.

    In a process of its own: after a compile for Blackwell, Mosaic GPU compiles none for Hopper.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        kernels, temporaries = process.submit(gemv_on_a_b200, shape_name, rows).result()
    check_kernels(kernels, "gemv")
    assert temporaries < math.prod(SHAPES[shape_name])


def gemv_on_a_b200(shape_name, rows):
    n, k = SHAPES[shape_name]
    x = jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)

    def run(x, *weight):
        return nf4_matmul(x, *weight, implementation="mosaic_gpu")

    compiled, kernels = harness.inspect_kernels(CARDS["b200"], run, x, *packed(n, k))
    return kernels, compiled.memory_analysis().temp_size_in_bytes


def test_the_hopper_gemv_with_few_look_ups_and_long_loads():
    """The candidates that are furthest from the default still leave registers."""
    (n, k), config = SHAPES["7b-qkvo"], GemvConfig(8, 4, 1, 0, 2, skip_zeros=True, segments=4)
    layout = Layout((n, k), "nf4", 64, double_quant=True)
    kernel = kernel_of("gemv")

    def run(x, xa, b, *weight):
        return kernel(x, *weight, None, lora=(xa, b), layout=layout, config=config)

    x, xa, b = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, k), (1, 64), (n, 64)))
    _, kernels = harness.inspect_kernels(CARDS["h200"], run, x, xa, b, *packed(n, k))
    check_kernels(kernels, "gemv")


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX starts no kernel early")
def test_the_hopper_gemv_can_start_before_the_kernel_in_front_has_ended():
    """It asks for its rows and waits, in this order, and loads nothing before."""
    (n, k), config = SHAPES["7b-qkvo"], GemvConfig(early=True)
    x = jax.ShapeDtypeStruct((1, k), jnp.bfloat16)

    def run(x, *weight):
        return nf4_matmul(x, *weight, implementation="mosaic_gpu", config=config)

    lowered = harness.lower_for(CARDS["h200"], run, x, *packed(n, k)).as_text()
    assert "mosaic_gpu.uses_pdl" in lowered
    _, kernels = harness.inspect_kernels(CARDS["h200"], run, x, *packed(n, k), sass=True)
    check_kernels(kernels, "gemv")
    order = re.findall(r"PREEXIT|UBLKPF\.L2|ACQBULK|LDG", kernels[0].sass)
    assert order[:6] == ["PREEXIT", *["UBLKPF.L2"] * 3, "ACQBULK", "LDG"]


@pytest.mark.parametrize(("rows", "k"), [(12, 512), (8, 28672)])
def test_the_hopper_gemv_takes_all_few_rows_by_name(rows, k):
    """More rows than eight; rows that do not fit into shared memory, whose sum is split."""
    n, x = 256, jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)

    def run(x, *weight):
        return nf4_matmul(x, *weight, implementation="mosaic_gpu")

    compiled, kernels = harness.inspect_kernels(CARDS["h200"], run, x, *packed(n, k))
    check_kernels(kernels, "gemv")
    parts = Plan(rows, n, k, "bfloat16", True, False, choose_config(rows, n, k)).split
    assert (parts > 1) == (k == 28672)
    temporary = 4 * parts * rows * n if parts > 1 else 0
    assert compiled.memory_analysis().temp_size_in_bytes <= temporary


def test_hopper_matmul_of_few_rows_can_split_its_sum():
    """A tile of 32 rows, eight of its parts at work at once: a quarter of the weight in float32."""
    (n, k), rows, config = SHAPES["7b-qkvo"], 32, MatmulConfig(rows=32, split=8)
    x = jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)

    def run(x, *weight):
        return nf4_matmul(x, *weight, implementation="mosaic_gpu", config=config)

    compiled, kernels = harness.inspect_kernels(CARDS["h200"], run, x, *packed(n, k))
    check_kernels(kernels, "matmul")
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 8 * rows * n + 2**16


@pytest.mark.parametrize("op", ["matmul", "transposed"])
def test_hopper_matmuls_with_wide_look_ups(op):
    """Twice the registers for what was looked up, and no conversion before a weight is scaled."""
    config = MatmulConfig(stages=4, wide=True)
    _, kernels = compiled_for_h200(op, *SHAPES["7b-gate"], 4096, config)
    (code,) = (kernel for kernel in kernels if "mosaic_gpu" in kernel.name)
    assert "cvt.f32.f16" not in code.ptx


@pytest.mark.parametrize(
    ("shape_name", "op", "rows", "rank"),
    [
        ("7b-qkvo", "matmul", 4096, 64),
        ("7b-gate", "transposed", 4096, 0),
        # Two blocks of 64 weights a thread, also for rows that are no eights; long rows; two teams.
        pytest.param("7b-gate", "matmul", 2048, 0, marks=pytest.mark.slow),
        pytest.param("7b-gate", "transposed", 2100, 0, marks=pytest.mark.slow),
        pytest.param("70b-down", "matmul", 16384, 0, marks=pytest.mark.slow),
    ],
)
def test_hopper_teams(shape_name, op, rows, rank):
    """Four groups a team are all that is ever decoded; who multiplies does nothing else."""
    (n, k), config = SHAPES[shape_name], MatmulConfig(stages=4, team=True)
    shapes = [(rows, n if op == "transposed" else k)]
    shapes += [(rows, rank), (n, rank)] if rank else []
    x, *low = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    kernel, layout = kernel_of(op), Layout((n, k), "nf4", 64, double_quant=True)

    def run(x, low, *weight):
        more = () if op == "transposed" else (None, low or None)
        return kernel(x, *weight, *more, layout=layout, config=config)

    compiled, kernels = harness.inspect_kernels(
        CARDS["h200"], run, x, tuple(low), *packed(n, k), sass=True
    )
    check_kernels(kernels, op)
    (code,) = (kernel for kernel in kernels if "mosaic_gpu" in kernel.name)
    loop = count_hot_loop(code.sass)
    assert loop.opcodes["HGMMA.64x256x16.F32.BF16"] == 4
    assert loop.instructions < 60
    # Behind the table's barrier stored, ordered before copies, by all threads, counted; a count
    # seen, by all threads, ordered before copies.
    stored, fence, barrier, seen = "STG.E.128", "FENCE.VIEW.ASYNC.G", "BAR.SYNC", "LDG.E.STRONG.GPU"
    known = "|".join(map(re.escape, (stored, fence, barrier, "REDG", seen)))
    found = [step for step, _ in itertools.groupby(re.findall(known, code.sass))]
    assert found[:8] == [barrier, stored, fence, barrier, "REDG", seen, barrier, fence]
    # What was stored before a count is seen with it; relaxed loads are the same to SASS' names.
    assert "ld.acquire.gpu.global.b32" in code.ptx
    copies = 2 * n * rank + (2 * (rows + 4) * shapes[0][1] if rows % 8 else 0)
    rooms = SMS // -(-rows // 256) * mosaic_team.ROOM * 2**18
    assert compiled.memory_analysis().temp_size_in_bytes < rooms + copies + 2**16


@pytest.mark.parametrize(
    ("op", "n", "k", "rows"),
    [
        ("matmul", 3200, 8640, 1024),  # a tile or two for a block, 135 steps
        ("transposed", 8640, 3200, 1024),
        ("matmul", 16, 128, 64),  # the smallest
    ],
)
def test_hopper_matmuls_of_odd_sizes(op, n, k, rows):
    compiled_for_h200(op, n, k, rows)


@pytest.mark.parametrize(("op", "rows"), [("gemv", 1), ("matmul", 64), ("transposed", 64)])
def test_hopper_kernels_of_stacked_weights_under_vmap(op, rows):
    """A loop over the stack: Pallas cannot batch a kernel of transformed references."""
    layout, kernel = Layout((512, 512), "nf4", 64, True), kernel_of(op)
    after = () if op == "transposed" else (None,)
    x = jax.ShapeDtypeStruct((2, rows, 512), jnp.bfloat16)
    stack = [jax.ShapeDtypeStruct((2, *part.shape), part.dtype) for part in packed(512, 512)]

    def run(x, *weight):
        return kernel(x, *weight, *after, layout=layout)

    compiled, kernels = harness.inspect_kernels(CARDS["h200"], jax.vmap(run), x, *stack)
    check_kernels(kernels, op)
    assert compiled.out_info.shape == (2, rows, 512)
    shared = jax.vmap(run, (0, *[None] * 4))
    harness.compile_for(CARDS["h200"], shared, x, *packed(512, 512))


@pytest.mark.parametrize(("op", "rows"), [("gemv", 1), ("matmul", 64), ("transposed", 64)])
def test_hopper_kernels_in_64_bit_mode(op, rows):
    # A shape of its own: a kernel that was compiled before in this process is not written again.
    size = 768
    layout, kernel = Layout((size, size), "nf4", 64, True), kernel_of(op)
    x = jax.ShapeDtypeStruct((rows, size), jnp.bfloat16)
    after = () if op == "transposed" else (None,)

    def run(x, *weight):
        return kernel(x, *weight, *after, layout=layout)

    with jax.enable_x64(True):
        _, kernels = harness.inspect_kernels(CARDS["h200"], run, x, *packed(size, size))
    check_kernels(kernels, op)


def check_kernels(kernels, op: str) -> None:
    own = [k for k in kernels if "mosaic_gpu" in k.name]
    assert own, [k.name for k in kernels]
    for code in own:
        if code.registers is not None:
            assert code.spill_bytes == 0
            assert code.registers * code.threads <= CARDS["h200"].multiprocessor.registers
        wide = re.search(r"ld\.(?:volatile\.)?global[\w.:]*\.v4\.[bu]32", code.ptx)
        assert wide or "cp.async.bulk" in code.ptx, "codes are not read 16 bytes at a time"
        if op != "gemv":
            assert "wgmma.mma_async" in code.ptx
