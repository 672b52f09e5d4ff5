"""Every kernel at Llama's linear shapes, compiled for cards that are not here.

What the compiler leaves is asserted: the weight never appears in 16 bits, shared memory fits the
card, no register spills, tensor cores where there are rows enough, codes in 16-byte loads. Tile
sizes are those of the dispatch's table, and for many rows, where its rule is to dequantize first,
FUSED beside it. The whole matrix is large; what is not marked slow covers every rule and op, and
every card with some of them.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import compile_for as harness
from pallas_kernels._triton_config import TritonConfig
from pallas_kernels.cards import CARDS, Card

pytestmark = [
    pytest.mark.skipif(
        not harness.gpu_compiler_available(), reason=f"no GPU compiler here. {harness.PLUGIN_HINT}"
    ),
]

TARGETS = ("a100-80", "l40", "rtx-4090", "h200")
SHAPES = {
    "7b-qkvo": (4096, 4096),
    "7b-gate": (11008, 4096),
    "7b-down": (4096, 11008),
    "70b-qo": (8192, 8192),
    "70b-kv": (1024, 8192),
    "70b-gate": (28672, 8192),
    "70b-down": (8192, 28672),
}
# (op, rows of x): decoding, a small batch, training forward and backward, the weight itself.
WORK = (
    ("gemv", 1),
    ("gemv", 4),
    ("matmul", 16),
    ("matmul", 4096),
    ("transposed", 4096),
    ("dequantize", 0),
)
# Two stages are what the 99 KiB of sm_86 and sm_89 hold beside the decoder's table.
FUSED = {
    "matmul": TritonConfig(128, 128, 64, num_warps=8, num_stages=2),
    "transposed": TritonConfig(128, 64, 128, num_warps=8, num_stages=2),
}
QUICK = {
    ("h200", "7b-qkvo"): (("gemv", 1), ("matmul", 16), ("matmul", 4096), ("dequantize", 0)),
    ("a100-80", "7b-gate"): (("gemv", 1), ("matmul", 4096), ("dequantize", 0)),
    ("l40", "7b-down"): (("matmul", 16), ("transposed", 4096)),
    ("rtx-4090", "70b-qo"): (("gemv", 4), ("matmul", 4096)),
}
MATRIX = [
    pytest.param(
        card,
        name,
        *work,
        id=f"{card}-{name}-{work[0]}-{work[1]}",
        marks=() if work in QUICK.get((card, name), ()) else pytest.mark.slow,
    )
    for card, name, work in itertools.product(TARGETS, SHAPES, WORK)
]


def packed(n: int, k: int, blocksize: int = 64) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of a double-quantized weight."""
    blocks = n * k // blocksize
    return (
        jax.ShapeDtypeStruct((n, k // 2), jnp.uint8),
        jax.ShapeDtypeStruct((blocks,), jnp.uint8),
        jax.ShapeDtypeStruct((-(-blocks // 256),), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.float32),
    )


def work_for(op: str, rows: int, n: int, k: int, implementation: str | None, config=None):
    """A function of shapes and its arguments."""
    weight = packed(n, k)
    if op == "dequantize":

        def unpack(*parts):
            return pallas_kernels.nf4_dequantize(*parts, implementation=implementation)

        return unpack, weight
    kernel = {
        "gemv": pallas_kernels.nf4_gemv,
        "matmul": pallas_kernels.nf4_matmul,
        "transposed": pallas_kernels.nf4_matmul_transposed,
    }[op]
    x = jax.ShapeDtypeStruct((rows, n if op == "transposed" else k), jnp.bfloat16)
    options = {"implementation": implementation, "config": config}
    return (lambda x, *parts: kernel(x, *parts, **options)), (x, *weight)


def reads_codes_in_16_bytes(ptx: str) -> bool:
    vector_load = re.search(r"ld\.(?:volatile\.)?global[\w.:]*\.v4\.[bu]32", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (0x10|16)\b", ptx)
    return bool(vector_load or copies or "cp.async.bulk" in ptx)


def products_beside_kernels(compiled: jax.stages.Compiled) -> list[str]:
    """The program's lines that tell of a product; what a kernel does inside is left out."""
    lines = compiled.as_text().splitlines()
    return [line for line in lines if "dot_general" in line and " custom-call(" not in line]


def check_kernel(card: Card, kernel: harness.KernelCode, op: str, rows: int) -> None:
    assert kernel.smem <= card.multiprocessor.smem_optin, kernel.smem
    if kernel.registers is not None:
        assert kernel.spill_bytes == 0, f"{kernel.spill_bytes} bytes of spills"
        assert kernel.registers * kernel.threads <= card.multiprocessor.registers
    assert reads_codes_in_16_bytes(kernel.ptx), "codes are not read 16 bytes at a time"
    if "nf4_pairs" in kernel.ptx:
        # What other threads stored is read behind a barrier (`_triton_decoder._fill_pairs`).
        order = re.findall(r"st\.shared\.v4\.f32|bar\.sync|ld\.shared\.b64", kernel.ptx)
        stored = len(order) - order[::-1].index("st.shared.v4.f32")
        assert "bar.sync" in order[stored : order.index("ld.shared.b64")]
    if rows >= 16:
        # On Hopper issue 3 asks for wgmma from 16 rows on. A wgmma has at least 64 rows: for 16,
        # three quarters would be padding, so there the older mma.sync of 16 rows is asserted.
        wanted = "wgmma.mma_async" if card.name == "h200" and rows >= 64 else "mma.sync"
        assert wanted in kernel.ptx, f"no {wanted}: the product is not on the tensor cores"


@pytest.mark.parametrize(("card_name", "shape_name", "op", "rows"), MATRIX)
def test_triton_kernel(card_name, shape_name, op, rows):
    card, (n, k) = CARDS[card_name], SHAPES[shape_name]
    config = FUSED[op] if rows > 16 else None
    fn, arguments = work_for(op, rows, n, k, "triton", config)
    compiled, kernels = harness.inspect_kernels(card, fn, *arguments)
    own = [kernel for kernel in kernels if kernel.name.startswith("nf4_")]
    assert own, [kernel.name for kernel in kernels]
    for kernel in own:
        check_kernel(card, kernel, op, rows)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < n * k, "a 16-bit copy of the weight lies among the temporaries"


@pytest.mark.parametrize(
    ("card_name", "shape_name", "rows"),
    [("h200", "7b-qkvo", 1), ("l40", "7b-down", 16), ("a100-80", "7b-gate", 4096)],
)
def test_triton_kernel_with_an_adapter(card_name, shape_name, rows):
    """One kernel for both products: the adapter's is not left to another."""
    card, (n, k) = CARDS[card_name], SHAPES[shape_name]
    config = FUSED["matmul"] if rows > 16 else None

    def run(x, xa, b, *weight):
        return pallas_kernels.nf4_matmul(
            x, *weight, lora=(xa, b), implementation="triton", config=config, fuse_lora=True
        )

    adapter = [jax.ShapeDtypeStruct((size, 64), jnp.bfloat16) for size in (rows, n)]
    x = jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)
    compiled, kernels = harness.inspect_kernels(card, run, x, *adapter, *packed(n, k))
    own = [kernel for kernel in kernels if kernel.name.startswith("nf4_")]
    assert len(own) == 1
    check_kernel(card, own[0], "matmul", rows)
    assert not products_beside_kernels(compiled)
    assert compiled.memory_analysis().temp_size_in_bytes < n * k


@pytest.mark.parametrize("rank", [0, 64])
@pytest.mark.parametrize("card_name", TARGETS)
def test_triton_tile_of_float32(card_name, rank):
    """Twice the registers of 16 bits, and still none spilled."""
    n, k = SHAPES["7b-qkvo"]

    def run(x, xa, b, *weight):
        lora = (xa, b) if rank else None
        return pallas_kernels.nf4_matmul(
            x, *weight, lora=lora, implementation="triton", fuse_lora=bool(rank)
        )

    x, xa, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, k), (16, 64), (n, 64)))
    _, kernels = harness.inspect_kernels(CARDS[card_name], run, x, xa, b, *packed(n, k))
    own = [kernel for kernel in kernels if kernel.name.startswith("nf4_")]
    assert len(own) == 1
    if own[0].registers is not None:
        assert own[0].spill_bytes == 0, f"{own[0].spill_bytes} bytes of spills"


@pytest.mark.parametrize("op", ["matmul", "transposed"])
@pytest.mark.parametrize(
    "card_name", ["a100-80", *(pytest.param(c, marks=pytest.mark.slow) for c in TARGETS[1:])]
)
def test_rule_for_many_rows_dequantizes_first(card_name, op):
    """One dequantizing kernel, one product by the library, one 16-bit weight and no more."""
    n, k = SHAPES["7b-gate"]
    fn, arguments = work_for(op, 4096, n, k, "triton")
    compiled, kernels = harness.inspect_kernels(CARDS[card_name], fn, *arguments)
    own = [kernel for kernel in kernels if kernel.name.startswith("nf4_")]
    assert [kernel.name for kernel in own] == ["nf4_dequantize"]
    check_kernel(CARDS[card_name], own[0], "dequantize", 0)
    assert 2 * n * k <= compiled.memory_analysis().temp_size_in_bytes < 3 * n * k


def test_what_the_dispatch_chooses_compiles():
    """With no implementation named, the card that is compiled for decides."""
    fn, arguments = work_for("matmul", 512, 4096, 4096, None)
    compiled, kernels = harness.inspect_kernels(CARDS["h200"], fn, *arguments)
    assert any("mosaic_gpu" in kernel.name for kernel in kernels)
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096


@pytest.mark.parametrize("rows", [1, 4096])
def test_xla_path_compiles_for_a_gpu(rows):
    fn, arguments = work_for("matmul", rows, 4096, 4096, "xla")
    harness.compile_for(CARDS["h200"], fn, *arguments)
