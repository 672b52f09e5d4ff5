"""Every kernel at Llama's linear shapes, compiled for cards that are not here.

What the compiler leaves is asserted: the weight never appears in 16 bits, shared memory fits the
card, no register spills, tensor cores where there are rows enough, codes in 16-byte loads. The
whole matrix is large; what is not marked slow covers every op on every card at one size each.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import compile_for as harness
from pallas_kernels.cards import CARDS, Card

pytestmark = pytest.mark.skipif(
    not harness.gpu_compiler_available(), reason=f"no GPU compiler here. {harness.PLUGIN_HINT}"
)

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
WORK = (("gemv", 1), ("matmul", 16), ("matmul", 4096), ("transposed", 4096), ("dequantize", 0))
QUICK = {
    ("h200", "7b-qkvo"): WORK,
    ("a100-80", "7b-gate"): (("gemv", 1), ("matmul", 4096), ("dequantize", 0)),
    ("l40", "7b-down"): (("matmul", 16), ("transposed", 4096)),
    ("rtx-4090", "70b-qo"): (("gemv", 1), ("matmul", 4096), ("transposed", 4096)),
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


def work_for(op: str, rows: int, n: int, k: int, implementation: str):
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
    return (lambda x, *parts: kernel(x, *parts, implementation=implementation)), (x, *weight)


def reads_codes_in_16_bytes(ptx: str) -> bool:
    vector_load = re.search(r"ld\.(?:volatile\.)?global[\w.:]*\.v4\.[bu]32", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (0x10|16)\b", ptx)
    return bool(vector_load or copies or "cp.async.bulk" in ptx)


def check_kernel(card: Card, kernel: harness.KernelCode, op: str, rows: int) -> None:
    assert kernel.smem <= card.multiprocessor.smem_optin, kernel.smem
    if kernel.registers is not None:
        assert kernel.spill_bytes == 0, f"{kernel.spill_bytes} bytes of spills"
        assert kernel.registers * kernel.threads <= card.multiprocessor.registers
    assert reads_codes_in_16_bytes(kernel.ptx), "codes are not read 16 bytes at a time"
    if rows >= 16:
        # A wgmma multiplies 64 rows at least: for 16, three quarters of it would be padding.
        wanted = "wgmma.mma_async" if card.name == "h200" and rows >= 64 else "mma.sync"
        assert wanted in kernel.ptx, f"no {wanted}: the product is not on the tensor cores"


@pytest.mark.parametrize(("card_name", "shape_name", "op", "rows"), MATRIX)
def test_triton_kernel(card_name, shape_name, op, rows):
    card, (n, k) = CARDS[card_name], SHAPES[shape_name]
    fn, arguments = work_for(op, rows, n, k, "triton")
    compiled, kernels = harness.inspect_kernels(card, fn, *arguments)
    own = [kernel for kernel in kernels if kernel.name.startswith("nf4_")]
    assert own, [kernel.name for kernel in kernels]
    for kernel in own:
        check_kernel(card, kernel, op, rows)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < n * k, "a 16-bit copy of the weight lies among the temporaries"


@pytest.mark.parametrize("rows", [1, 4096])
def test_xla_path_compiles_for_a_gpu(rows):
    fn, arguments = work_for("matmul", rows, 4096, 4096, "xla")
    harness.compile_for(CARDS["h200"], fn, *arguments)
