"""What runs where, and what is refused."""

import dataclasses
import functools
import importlib.metadata
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    CARDS,
    GemvConfig,
    Layout,
    MatmulConfig,
    TritonConfig,
    configs_to_try,
    dispatch,
    nf4_dequantize,
    nf4_matmul,
    which_implementation,
)
from pallas_kernels._mosaic import SHARED_LIMIT
from pallas_kernels._table import Cut, config_type, cuts, rules, using_table
from pallas_kernels.dispatch import AVAILABLE
from pallas_kernels.nf4_gemv.mosaic_plan import choose_config as choose_gemv
from pallas_kernels.nf4_matmul.api import _is_gemv
from pallas_kernels.nf4_matmul.mosaic_plan import choose_config as choose_matmul
from tests.pallas_kernels.base import activations, adapter, make_case

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


def test_a_card_that_the_table_does_not_know_is_asked_itself(monkeypatch):
    """A V100 has no Triton kernels; an H100 of another make has the Hopper ones, if asked for."""

    def chosen_on(kind, capability, op="nf4_gemv", **ask):
        device = types.SimpleNamespace(device_kind=kind, compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda *_: [device])
        return which_implementation(op, 1, WEIGHT, **ask)

    old = chosen_on("Tesla V100-SXM2-16GB", "7.0")
    assert old.implementation == "xla"
    assert "'Tesla V100-SXM2-16GB' is older" in old.reason
    assert chosen_on("NVIDIA A10G", "8.6").implementation == "triton"
    ask = {"implementation": "mosaic_gpu"}
    assert chosen_on("NVIDIA H100 PCIe", "9.0", **ask).implementation == "mosaic_gpu"
    with pytest.raises(ValueError, match=r"compute capability 9\.0 or 10\.0 and"):
        chosen_on("NVIDIA A10G", "8.6", **ask)
    # The card of that kind among others, and no other maker's, who count otherwise.
    kinds = {"AMD Instinct MI300X": "gfx942", "NVIDIA A10G": "8.6", "Tesla V100-SXM2-16GB": "7.0"}
    here = [
        types.SimpleNamespace(device_kind=kind, compute_capability=found)
        for kind, found in kinds.items()
    ]
    monkeypatch.setattr(jax, "devices", lambda *_: here)
    assert [dispatch.capability(kind) for kind in kinds] == [None, (8, 6), (7, 0)]


def test_a_b200_has_the_hopper_gemv_if_asked_for_and_no_wgmma():
    def ask(op, rows):
        implementation = "mosaic_gpu"
        return which_implementation(
            op, rows, WEIGHT, implementation=implementation, kind="NVIDIA B200"
        )

    assert ask("nf4_gemv", 1).implementation == "mosaic_gpu"
    assert (
        which_implementation("nf4_gemv", 1, WEIGHT, kind="NVIDIA B200").implementation == "triton"
    )
    for op in ("nf4_matmul", "nf4_matmul_transposed"):
        with pytest.raises(ValueError, match=r"compute capability 9\.0 and 'NVIDIA B200' has"):
            ask(op, 64)


def test_the_default_device_is_the_one_that_jax_is_told(monkeypatch):
    """`jax.default_device` on a machine with a card, as its object and as a platform's name."""
    (cpu, *_), card = jax.devices(), types.SimpleNamespace(device_kind="NVIDIA H200")
    monkeypatch.setattr(jax, "devices", lambda platform=None: [cpu if platform else card])
    assert dispatch.target() == "NVIDIA H200"
    for device in (cpu, "cpu"):
        with jax.default_device(device):
            assert dispatch.target() == "cpu"


@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB"])
@pytest.mark.parametrize("op", ["nf4_gemv", "nf4_matmul", "nf4_matmul_transposed"])
@pytest.mark.parametrize("asked", [None, "triton"])
def test_no_rows_need_no_kernel(op, kind, asked):
    choice = which_implementation(op, 0, WEIGHT, implementation=asked, kind=kind)
    assert choice.implementation == "xla"


def test_without_pallas_triton_lowering_all_else_runs():
    """JAX has deprecated it."""
    program = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None
import jax.numpy as jnp
import pallas_kernels
from pallas_kernels.nf4_gemv import mosaic_sm90
from pallas_kernels.nf4_matmul import mosaic_sm90
from pallas_kernels.nf4_matmul_transposed import mosaic_sm90
x, codes, absmax = jnp.ones((1, 64)), jnp.zeros((2, 32), jnp.uint8), jnp.ones(2)
assert (pallas_kernels.nf4_matmul(x, codes, absmax) == -64).all()
try:
    pallas_kernels.nf4_matmul(x, codes, absmax, implementation="triton", interpret=True)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "jax.experimental.pallas.triton" in done.stdout


def test_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match="op is 'gemv'; expected one of"):
        which_implementation("gemv", 1, WEIGHT)


def test_few_rows_of_a_matmul_are_a_gemvs_as_in_the_call():
    one, most = (chosen("nf4_gemv", rows, (4096, 4096)) for rows in (1, 16))
    of_a_matmul = [chosen("nf4_matmul", rows, (4096, 4096)) for rows in (1, 16, 17)]
    assert of_a_matmul[:2] == [one, most]
    assert of_a_matmul[2] != most


@pytest.mark.parametrize("op", AVAILABLE)
def test_weights_of_more_elements_than_31_bits_count_run_in_xla(op):
    huge = Layout((2**17, 2**14), "nf4", 64, double_quant=True)
    choice = which_implementation(op, 64 if "matmul" in op else 1, huge, kind="NVIDIA L40")
    assert choice.implementation == "xla"
    assert "more elements than 31 bits count" in choice.reason


def test_stacks_of_more_codes_than_31_bits_count_are_taken_in_turn():
    def shapes(count):
        one = {"codes": (2**15, 2**14), "absmax": (2**24,)}
        return {
            name: jax.ShapeDtypeStruct((count, *shape), jnp.uint8 if name == "codes" else "float32")
            for name, shape in one.items()
        }

    def loops(count, function):
        return str(jax.make_jaxpr(jax.vmap(function))(shapes(count))).count(" scan[")

    def one(weight):
        return nf4_dequantize(**weight, implementation="triton", interpret=True)

    assert loops(4, one) == 1
    assert loops(3, one) == 0

    def pairs(weight):
        twice = {name: jnp.broadcast_to(leaf, (2, *leaf.shape)) for name, leaf in weight.items()}
        return jax.vmap(one)(twice)

    # Two by two as well, of which a call sees two; the loop is over the outer axis alone.
    assert loops(2, pairs) == 1
    assert loops(1, pairs) == 0


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


def test_interpreted_kernels_need_no_card_and_the_other_two_are_not_interpreted():
    ask = {"interpret": True, "kind": "Tesla T4"}
    assert chosen("nf4_gemv", 1, (64, 64), implementation="triton", **ask).config is not None
    with pytest.raises(ValueError, match="interpreter cannot run it"):
        chosen("nf4_gemv", 1, (64, 64), "NVIDIA H200", implementation="mosaic_gpu", interpret=True)
    with pytest.raises(ValueError, match="Triton's own does"):
        chosen("nf4_dequantize", 1, (64, 64), implementation="jax_triton", **ask)


def test_flat_bytes_are_dequantized_whatever_rows_they_are_of():
    choice = which_implementation("nf4_dequantize", 1, CROSSING, kind="NVIDIA L40")
    assert choice.implementation == "triton"


def test_jax_triton_has_tritons_tile_sizes(monkeypatch):
    monkeypatch.setattr(dispatch, "missing_jax_triton", lambda: None)
    ask = {"kind": "NVIDIA H200"}
    choice = which_implementation("nf4_dequantize", 1, WEIGHT, implementation="jax_triton", **ask)
    other = which_implementation("nf4_dequantize", 1, WEIGHT, implementation="triton", **ask)
    assert choice == dataclasses.replace(other, implementation="jax_triton")
    assert choice.config is not None


@pytest.mark.parametrize(
    ("jax_triton", "triton", "version", "message"),
    [
        ("0.4.0", "3.7.0", (0, 10, 2), None),
        ("0.3.9", "3.7.0", (0, 10, 2), "jax-triton is 0.3.9 and it needs jax-triton >= 0.4"),
        ("0.4.1", "3.6.2", (0, 10, 2), "triton is 3.6.2 and it needs triton >= 3.7"),
        ("0.4.1", None, (0, 10, 2), "triton is not installed"),
        ("0.4.1", "4.0.0", (0, 11, 2), None),
        ("0.4.1", "4.0.0", (0, 12, 0), "jax-triton 0.4 cannot be lowered in loops"),
        ("0.5.0", "4.0.0", (0, 12, 0), None),
    ],
)
def test_what_the_extra_triton_needs(monkeypatch, jax_triton, triton, version, message):
    installed = {"jax-triton": jax_triton, "triton": triton}

    def found(package):
        if installed[package] is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", found)
    monkeypatch.setattr(jax, "__version_info__", version)
    problem = dispatch.missing_jax_triton.__wrapped__()
    assert (problem is None) if message is None else problem.startswith(message)


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
    if op == "nf4_gemv" and rows <= 4:
        # 16-byte loads a lane, and products of them.
        loads = [c.block_n * c.block_k // 32 / (32 * c.num_warps) for c in found]
        assert min(loads) >= 1
        assert max(loads) * rows == {1: 4, 4: 8}[rows]
    if op == "nf4_matmul_transposed":
        forward = configs_to_try("nf4_matmul", rows, 4096, 11008)
        tiles = [[(c.block_n, c.block_k) for c in here if c.fused] for here in (found, forward)]
        assert tiles[0] == [(block_k, block_n) for block_n, block_k in tiles[1]]


@pytest.mark.parametrize(("n", "k", "splits"), [(32768, 1024, {1, 2}), (4096, 512, {1, 2})])
def test_a_sum_is_split_until_the_card_is_filled_or_two_tiles_are_left(n, k, splits):
    found = configs_to_try("nf4_gemv", 16, n, k)
    assert {c.split_k for c in found if (c.block_n, c.block_k) == (32, 128)} == splits


def test_a_rule_says_whether_the_adapter_is_fused(tmp_path):
    """And which tile sizes; the caller's own word stands above it."""
    rule = {"op": "nf4_matmul", "card": "*", "max_rows": 64, "implementation": "triton"}
    rule |= {"config": {"block_m": 16, "block_n": 16, "block_k": 64, "num_warps": 1}}
    table = tmp_path / "tuned.json"
    table.write_text(json.dumps([rule | {"fuse_lora": True}]))
    case, x = make_case(0, 16, 128), activations(0, 17, 128, "bfloat16")
    lora = adapter(1, 17, 16, 8, "bfloat16")
    run = functools.partial(
        nf4_matmul, x, *case.arrays, None, lora, implementation="triton", interpret=True
    )
    with using_table(table):
        for asked in (None, "triton"):
            choice = which_implementation(
                "nf4_matmul", 64, WEIGHT, implementation=asked, kind="NVIDIA H200"
            )
            assert choice.fuse_lora
            assert choice.config == TritonConfig(16, 16, 64, num_warps=1)
        np.testing.assert_array_equal(run(), run(fuse_lora=True))
        assert (run() != run(fuse_lora=False)).any()
        before = rules()
    few = functools.partial(nf4_matmul, x[:2], *case.arrays, None, (lora[0][:2], lora[1]))
    assert (few(fuse_lora=True) != few(fuse_lora=False)).any()
    # What the file does not speak of stands as ever.
    assert before[1:] == rules()


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
    with pytest.raises(ValueError, match=r"n in multiples of 16 .* not \(40, 128\)"):
        chosen("nf4_matmul", 64, (40, 128), **ask)
    assert chosen("nf4_gemv", 1, (40, 128), **ask).implementation == "mosaic_gpu"
    with pytest.raises(ValueError, match="not float32"):
        which_implementation("nf4_gemv", 1, WEIGHT, kind="NVIDIA H200", dtype=jnp.float32, **ask)
    # A row less than 4 GiB of activations.
    assert chosen("nf4_matmul", 2**19 - 1, (4096, 64), **ask).implementation == "mosaic_gpu"


@pytest.mark.parametrize(
    ("op", "rows", "layout", "message"),
    [
        ("nf4_gemv", 1, ((64, 128), "int8", 64), r"not int8 \(64, 128\) in blocks of 64"),
        ("nf4_gemv", 1, ((64, 128), "nf4", 128), r"not nf4 \(64, 128\) in blocks of 128"),
        ("nf4_gemv", 1, ((2, 64, 128), "nf4", 64), r"not nf4 \(2, 64, 128\) in"),
        ("nf4_gemv", 1, ((41, 128), "nf4", 64), r"n in multiples of 2 .* not \(41, 128\)"),
        ("nf4_matmul_transposed", 64, ((64, 64), "nf4", 64), r"k in multiples of 128, not"),
        ("nf4_matmul_transposed", 64, ((32, 128), "nf4", 64), r"n in multiples of 64 and k"),
        ("nf4_matmul", 2**19, ((4096, 64), "nf4", 64), r"not 524288 rows of \(4096, 64\)"),
        ("nf4_matmul", 2**19, ((64, 4096), "nf4", 64), r"not 524288 rows of \(64, 4096\)"),
        ("nf4_gemv", 1, ((2**17, 2**16), "nf4", 64), "less than 4 GiB of codes"),
    ],
)
def test_weights_that_no_hopper_kernel_takes(op, rows, layout, message):
    ask = {"implementation": "mosaic_gpu", "kind": "NVIDIA H200"}
    with pytest.raises(ValueError, match=message):
        which_implementation(op, rows, Layout(*layout, double_quant=True), **ask)


def chosen(op, rows, shape, kind="NVIDIA H200", **more):
    return which_implementation(op, rows, Layout(shape, "nf4", 64, True), kind=kind, **more)


def test_where_a_rule_cannot_run_the_next_one_does():
    assert chosen("nf4_gemv", 1, (4096, 4096)).reason == "rule for h200"
    single = chosen("nf4_gemv", 1, (4096, 4096), dtype=jnp.float32)
    assert single.implementation == "triton"
    assert single.config is not None
    assert single.reason.startswith("rule for every card; not mosaic_gpu: it ")
    crossing = which_implementation("nf4_matmul", 4096, CROSSING, kind="NVIDIA H200")
    assert crossing.implementation == "xla"
    assert "not triton: blocks of 64 cross" in crossing.reason


@pytest.mark.parametrize("card", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_the_hopper_gemv_is_chosen_as_far_as_it_is_measured(card):
    """Beyond that it runs by name: more than 8 rows, and rows that shared memory does not hold."""
    for rows, k, wanted in (
        (8, 8192, "mosaic_gpu"),
        (2, 28672, "mosaic_gpu"),
        (9, 4096, "triton"),
        (8, 11008, "triton"),
        (4, 28672, "triton"),
    ):
        assert chosen("nf4_gemv", rows, (8192, k), card).implementation == wanted
        named = chosen("nf4_gemv", rows, (8192, k), card, implementation="mosaic_gpu")
        assert named.implementation == "mosaic_gpu"


@pytest.mark.parametrize("card", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
@pytest.mark.parametrize("op", ["nf4_matmul", "nf4_matmul_transposed"])
def test_hopper_matmuls_need_tiles_enough(card, op):
    """64 tiles of 256 rows by 128 columns; else the weight is dequantized for XLA's product."""
    for rows, width, wanted in (
        (64, 8192, "mosaic_gpu"),
        (64, 4096, "triton"),
        (256, 4096, "triton"),
        (257, 4096, "mosaic_gpu"),
        (4096, 1024, "mosaic_gpu"),
        (1024, 1024, "triton"),
    ):
        shape = (2048, width) if op == "nf4_matmul_transposed" else (width, 2048)
        choice = chosen(op, rows, shape, card)
        assert choice.implementation == wanted, (rows, width, choice)
        assert wanted == "mosaic_gpu" or not choice.config.fused


@pytest.mark.parametrize("card", [card for card in CARDS.values() if card.supports_triton])
@pytest.mark.parametrize("op", AVAILABLE)
def test_triton_has_tile_sizes_for_every_card_and_number_of_rows(card, op):
    for rows in (1, 4, 5, 16) if op == "nf4_gemv" else (1, 17, 64, 100_000):
        ask = {"implementation": "triton", "interpret": True}
        assert chosen(op, rows, (512, 512), card.description, **ask).config is not None
        assert chosen(op, rows, (512, 512), card.description).implementation != "xla"


def test_a_measured_cut_goes_before_the_rules_config(monkeypatch):
    shape, cut = (4096, 4096), GemvConfig(selects=2)
    others = (
        Cut("nf4_gemv", "h200", 1, 4, "triton", shape, TritonConfig(1, 8, 1024)),
        Cut("nf4_matmul", "h200", 1, 4, "mosaic_gpu", shape, MatmulConfig(stages=4)),
    )
    line = Cut("nf4_gemv", "h200", 2, 3, "mosaic_gpu", shape, cut)
    monkeypatch.setattr(dispatch, "cuts", lambda: (*others, line))
    for rows in (2, 3):
        assert chosen("nf4_gemv", rows, shape).config == cut
        assert chosen("nf4_gemv", rows, shape, implementation="mosaic_gpu").config == cut
    for rows, size, kind in (
        (1, shape, "NVIDIA H200"),
        (4, shape, "NVIDIA H200"),
        (2, (4096, 11008), "NVIDIA H200"),
        (2, shape, "NVIDIA H100 80GB HBM3"),
    ):
        assert chosen("nf4_gemv", rows, size, kind) == dataclasses.replace(
            chosen("nf4_gemv", rows, size, kind), implementation="mosaic_gpu", config=None
        )


def test_a_cut_for_a_team_is_none_for_too_few_rows(monkeypatch):
    """It was measured with 4096 rows, and holds from where fewer were measured."""
    shape, team = (4096, 4096), MatmulConfig(team=True, stages=4)
    line = Cut("nf4_matmul", "h200", 1025, 4096, "mosaic_gpu", shape, team)
    monkeypatch.setattr(dispatch, "cuts", lambda: (line,))
    configs = [chosen("nf4_matmul", rows, shape).config for rows in (1024, 1792, 1793, 4096, 4097)]
    assert configs == [None, None, team, team, None]


def test_float32_takes_half_of_a_tiles_rows_of_w():
    """Of a tile of tensor cores' alone: not of scalar products, nor of what dequantizes first."""
    tile = TritonConfig(16, 32, 64)
    row, first = TritonConfig(1, 32, 64), TritonConfig(16, 32, 64, fused=False)
    assert dispatch._narrowed(tile, jnp.float32) == TritonConfig(16, 16, 64)
    for config in (row, first, GemvConfig(), None):
        assert dispatch._narrowed(config, jnp.float32) == config
    assert dispatch._narrowed(tile, jnp.float16) == tile


def test_cards_are_known_by_every_name_of_theirs():
    for card in CARDS.values():
        assert dispatch.card_name(card.name) == dispatch.card_name(card.description) == card.name
        assert dispatch.card_name(card.pallas_kind) in CARDS
    assert {dispatch.card_name(kind) for kind in ("Quadro RTX 6000", "Tesla K80")} == {"other"}
    assert {dispatch.card_name(kind) for kind in ("AMD Instinct MI300X", "cpu")} == {None}


def test_few_rows_are_the_gemvs_unless_a_config_is_the_matmuls():
    few, many, none = (jnp.zeros((rows, 64)) for rows in (16, 17, 0))
    assert _is_gemv(few, None)
    assert _is_gemv(few, GemvConfig())
    assert _is_gemv(few, TritonConfig(8, 16, 64))
    assert not _is_gemv(few, TritonConfig(16, 16, 64))
    assert not _is_gemv(few, MatmulConfig())
    assert not _is_gemv(many, None)
    assert not _is_gemv(none, None)


def test_an_op_chooses_by_its_activations_kind(monkeypatch):
    """No Hopper kernel takes float32."""
    monkeypatch.setattr(dispatch, "target", lambda: "NVIDIA H200")
    weight = (jnp.zeros((64, 32), jnp.uint8), jnp.ones(64))
    run = jax.make_jaxpr(lambda x: nf4_matmul(x, *weight))
    assert "mosaic_gpu" not in str(run(jnp.ones((1, 64))))


def test_cuts_name_what_exists():
    for cut in cuts():
        assert cut.card in CARDS
        assert isinstance(cut.config, config_type(cut.op, cut.implementation))


@pytest.mark.parametrize("op", ["nf4_gemv", "nf4_matmul", "nf4_matmul_transposed"])
def test_the_first_hopper_candidate_is_the_kernels_own_choice(op):
    rows = 8 if op == "nf4_gemv" else 4096
    found = configs_to_try(op, rows, 5120, 5120, "mosaic_gpu")
    if op == "nf4_gemv":
        own = choose_gemv(rows, 5120, 5120)
    else:
        own = choose_matmul(rows, transposed=op == "nf4_matmul_transposed")
    assert found[0] == own
    assert len(found) == len(set(found)) > 3


def test_of_few_rows_the_forward_kernel_may_split_its_sum():
    """Into parts of whole blocks, eight or more of them each; the backward kernel does not."""
    split = {c.split for c in configs_to_try("nf4_matmul", 48, 4096, 11008, "mosaic_gpu")}
    assert split == {1, 2, 4}  # 172 blocks of 64
    assert {c.rows for c in configs_to_try("nf4_matmul", 24, 4096, 4096, "mosaic_gpu")} == {32, 64}
    back = configs_to_try("nf4_matmul_transposed", 48, 4096, 11008, "mosaic_gpu")
    assert {c.split for c in back} == {1}


def test_a_hopper_tile_is_the_smallest_that_holds_all_rows():
    tiles = {rows: choose_matmul(rows).rows for rows in (17, 64, 65, 128, 129, 4096)}
    assert tiles == {17: 64, 64: 64, 65: 128, 128: 128, 129: 256, 4096: 256}
    assert [choose_matmul(64, transposed=back).stages for back in (False, True)] == [5, 4]
    for config in configs_to_try("nf4_matmul", 4096, 4096, 4096, "mosaic_gpu"):
        assert config.shared_bytes <= SHARED_LIMIT


def test_of_thousands_of_rows_a_team_may_decode():
    for op in ("nf4_matmul", "nf4_matmul_transposed"):
        teams = {
            rows: [c.team for c in configs_to_try(op, rows, 4096, 4096, "mosaic_gpu")].count(True)
            for rows in (1792, 1793, 4096, 33792, 33793)
        }
        assert teams == {1792: 0, 1793: 1, 4096: 1, 33792: 1, 33793: 0}


def test_a_config_of_another_kernel_is_refused():
    case = make_case(0, 8, 128)
    with pytest.raises(ValueError, match="GemvConfig, and nf4_gemv runs 'triton' here, which"):
        nf4_matmul(
            jnp.ones((2, 128)),
            *case.arrays,
            implementation="triton",
            config=GemvConfig(),
            interpret=True,
        )
