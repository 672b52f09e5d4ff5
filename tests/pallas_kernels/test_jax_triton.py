"""The kernel behind "jax_triton": its numbers in Triton's interpreter, its launch by compiling it.

Both need the extra [triton] (jax-triton >= 0.4 with triton >= 3.7, hence Python >= 3.12).
"""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import CARDS, compile_for, nf4_dequantize, which_implementation
from pallas_kernels.dispatch import missing_jax_triton
from tests.pallas_kernels.test_dispatch import WEIGHT

needs_triton = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "jax_triton")),
    reason="the extra [triton] is not installed",
)
needs_launch = pytest.mark.skipif(
    missing_jax_triton() is not None, reason=missing_jax_triton() or ""
)


def test_it_says_what_is_missing():
    ask = {"implementation": "jax_triton", "kind": "NVIDIA H200"}
    if missing_jax_triton():
        with pytest.raises(ValueError, match="triton"):
            which_implementation("nf4_dequantize", 1, WEIGHT, **ask)
    else:
        choice = which_implementation("nf4_dequantize", 1, WEIGHT, **ask)
        assert choice.config is not None
    with pytest.raises(ValueError, match="has only"):
        which_implementation("nf4_matmul", 1, WEIGHT, **ask)


# Triton decides at import whether to interpret, and its interpreter takes torch tensors: this
# program, run in a process of its own, hands it NumPy arrays in a coat.
INTERPRET = """
import json, os, sys
os.environ["TRITON_INTERPRET"] = "1"
import numpy as np, jax.numpy as jnp
from pallas_kernels import CODEBOOKS, DYNAMIC_SIGNED, Layout
from pallas_kernels.nf4_dequantize.jax_triton import dequantize_kernel, kernel_constants
from tests.pallas_kernels.base import make_case

class Tensor:
    def __init__(self, array): self.array, self.dtype = array, self.name(array.dtype)
    def name(self, dtype): return {"uint8": "u8", "float32": "fp32", "float16": "fp16"}[str(dtype)]
    def data_ptr(self): return self.array.ctypes.data
    def untyped_storage(self): return self
    def cpu(self): return self
    def new_empty(self, *_, **__): return Tensor(self.array)
    def set_(self, *_): pass
    def copy_(self, *_): pass
    def storage_offset(self): return 0
    def size(self): return self.array.shape
    def stride(self): return self.array.strides

wrong = []
for settings in json.loads(sys.argv[1]):
    dtype = np.dtype(settings.pop("dtype"))
    case = make_case(**settings)
    double_quant = case.nested_absmax is not None
    layout = Layout((case.n, case.k), case.quant_type, case.blocksize, double_quant)
    out = np.full(layout.size, np.nan, dtype)
    unused = np.zeros(1, np.float32)
    operands = [case.codes.reshape(-1), case.absmax,
                unused if case.nested_absmax is None else case.nested_absmax,
                unused if case.offset is None else case.offset.reshape(1),
                DYNAMIC_SIGNED, CODEBOOKS[case.quant_type], out]
    width = 64
    dequantize_kernel[(-(-layout.size // (2 * width)),)](
        *(Tensor(np.ascontiguousarray(a)) if a is not out else Tensor(out) for a in operands),
        **kernel_constants(layout, width))
    if not np.array_equal(out.reshape(case.n, case.k).astype(np.float64), case.weight_as(dtype)):
        wrong.append(settings)
print(json.dumps(wrong))
"""


@needs_triton
def test_values_in_tritons_interpreter():
    """Double and single quantization, blocks that cross rows, a short last block, odd sizes."""
    cases = [
        {"seed": 1, "n": 5, "k": 128, "dtype": "float32"},
        {"seed": 2, "n": 7, "k": 33, "dtype": "float16", "double_quant": False},
        {"seed": 3, "n": 3, "k": 50, "dtype": "float32", "quant_type": "fp4", "blocksize": 32},
        {"seed": 4, "n": 300, "k": 64, "dtype": "float32", "blocksize": 32},
    ]
    done = subprocess.run(
        [sys.executable, "-c", INTERPRET, json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []


@needs_launch
@pytest.mark.skipif(not compile_for.gpu_compiler_available(), reason=compile_for.PLUGIN_HINT)
@pytest.mark.parametrize("stack", [(), (3,)], ids=["one", "vmapped"])
def test_it_compiles_for_a_card(stack):
    n, k = WEIGHT.shape

    def unpack(*weight):
        return nf4_dequantize(*weight, implementation="jax_triton")

    shapes = (
        jax.ShapeDtypeStruct((*stack, n, k // 2), jnp.uint8),
        jax.ShapeDtypeStruct((*stack, WEIGHT.blocks), jnp.uint8),
        jax.ShapeDtypeStruct((*stack, WEIGHT.nested_blocks), jnp.float32),
        jax.ShapeDtypeStruct(stack, jnp.float32),
    )
    function = jax.vmap(unpack) if stack else unpack
    compiled = compile_for.compile_for(CARDS["h200"], function, *shapes)
    assert compiled.memory_analysis().output_size_in_bytes == (3 if stack else 1) * n * k * 2
    assert "triton_kernel_call" in compiled.as_text()
