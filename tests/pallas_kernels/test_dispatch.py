"""What runs where, and what is refused."""

import jax.numpy as jnp
import pytest

from pallas_kernels import CARDS, Layout, configs_to_try, nf4_matmul, which_implementation
from pallas_kernels.dispatch import AVAILABLE, rules
from tests.pallas_kernels.base import make_case

WEIGHT = Layout((4096, 4096), "nf4", 64, double_quant=True)
CROSSING = Layout((33, 63), "nf4", 64, double_quant=False)


@pytest.mark.parametrize("op", AVAILABLE)
@pytest.mark.parametrize("kind", ["cpu", "TPU v5e"])
def test_everything_but_nvidia_runs_xla(op, kind):
    assert which_implementation(op, 1, WEIGHT, kind=kind).implementation == "xla"


@pytest.mark.parametrize("op", AVAILABLE)
def test_triton_needs_a_card(op):
    with pytest.raises(ValueError, match="needs an NVIDIA card and the program is for 'cpu'"):
        which_implementation(op, 1, WEIGHT, implementation="triton")
    with pytest.raises(ValueError, match=r"compute capability 8\.0"):
        which_implementation(op, 1, WEIGHT, implementation="triton", kind="Tesla T4")
    choice = which_implementation(op, 1, WEIGHT, implementation="triton", kind="NVIDIA H200")
    assert choice.implementation == "triton"
    assert choice.config is not None


def test_weights_that_no_kernel_takes():
    with pytest.raises(ValueError, match="cross the rows"):
        which_implementation(
            "nf4_matmul", 64, CROSSING, implementation="triton", kind="NVIDIA H200"
        )
    choice = which_implementation("nf4_matmul", 64, CROSSING, kind="NVIDIA H200")
    assert choice.implementation == "xla"
    int8 = Layout((64, 64), "int8", 64, double_quant=False)
    with pytest.raises(ValueError, match="4-bit"):
        which_implementation("nf4_dequantize", 1, int8, implementation="triton", interpret=True)


def test_asking_for_the_impossible_through_an_op():
    case = make_case(0, 8, 128)
    with pytest.raises(ValueError, match="pass implementation='xla'"):
        nf4_matmul(jnp.ones((2, 128)), *case.arrays, implementation="triton")


@pytest.mark.parametrize("op", AVAILABLE)
@pytest.mark.parametrize("rows", [1, 4, 16, 64, 4096])
def test_there_are_candidates(op, rows):
    if op == "nf4_gemv" and rows > 16:
        return
    found = configs_to_try(op, rows, 4096, 11008)
    assert len(found) == len(set(found)) > 3


def test_the_table_names_what_exists():
    for rule in rules():
        assert rule.card == "*" or rule.card in CARDS
        assert rule.implementation in AVAILABLE[rule.op]


def test_mosaic_needs_hopper_and_its_own_kind_of_weight():
    ask = {"implementation": "mosaic_gpu"}
    choice = which_implementation("nf4_gemv", 1, WEIGHT, kind="NVIDIA H200", **ask)
    assert choice.implementation == "mosaic_gpu"
    with pytest.raises(ValueError, match=r"compute capability 9\.0"):
        which_implementation("nf4_gemv", 1, WEIGHT, kind="NVIDIA L40", **ask)
    with pytest.raises(ValueError, match="multiples of 64"):
        which_implementation("nf4_matmul", 64, CROSSING, kind="NVIDIA H200", **ask)
    with pytest.raises(ValueError, match="not float32"):
        which_implementation("nf4_gemv", 1, WEIGHT, kind="NVIDIA H200", dtype=jnp.float32, **ask)
