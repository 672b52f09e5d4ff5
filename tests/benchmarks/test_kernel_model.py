"""benchmarks/kernel_model.py: counting SASS, and a model of a kernel compiled here."""

import dataclasses

import pytest

from benchmarks import kernel_model
from benchmarks._points import Point
from pallas_kernels import GemvConfig, MatmulConfig, TritonConfig, compile_for
from pallas_kernels.cards import CARDS

SASS = """
nf4_toy:
.text.nf4_toy:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MOV R2, RZ ;
.L_x_0:
        /*0020*/              @P1  LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/                   LDS.64 R8, [R4] ;
        /*0040*/                   LOP3.LUT R5, R4, 0xf, RZ, 0xc0, !PT ;
        /*0050*/                   FFMA R9, R8, R5, R9 ;
        /*0060*/                   FFMA R10, R8, R5, R10 ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, R24, gdesc[UR8], R24 ;
        /*0080*/             @!P0  BRA `(.L_x_0) ;
        /*0090*/                   STG.E [R2.64], R9 ;
        /*00a0*/                   EXIT ;
.L_x_1:
        /*00b0*/                   BRA `(.L_x_1);
        /*00c0*/                   NOP;
"""


def kernel(sass: str | None = SASS, **changes) -> compile_for.KernelCode:
    fields = {
        "name": "nf4_toy",
        "ptx": "",
        "smem": 32768,
        "grid": (264,),
        "threads": 256,
        "registers": 128,
        "spill_bytes": 0,
        "sass": sass,
    }
    return compile_for.KernelCode(**(fields | changes))


def test_the_hot_loop_is_counted_and_nothing_else():
    loop = kernel_model.count_hot_loop(SASS)
    assert loop.is_loop
    assert loop.instructions == 7
    assert loop.opcodes["FFMA"] == 2
    # A 16-byte load occupies its unit four times as long as a 4-byte one; a group of four warps
    # reads 128 columns of 32 bytes from shared memory.
    expected = {"global": 4, "shared": 2 + 8, "integer": 1, "float": 2, "tensor": 1, "control": 1}
    assert loop.units == expected
    assert loop.vector_loads == 1


def test_a_left_operand_in_shared_memory_is_read_there():
    """64 rows of 32 bytes more; the descriptor stands where the registers did."""
    loop = kernel_model.count_hot_loop(SASS.replace("R24, R24, gdesc[UR8]", "R24, gdesc[UR8]"))
    assert loop.units["shared"] == 2 + 8 + 4


def test_without_a_loop_everything_before_exit_counts():
    straight = SASS.replace("@!P0  BRA `(.L_x_0)", "MOV R0, RZ")
    loop = kernel_model.count_hot_loop(straight)
    assert not loop.is_loop
    assert loop.instructions == 10


@pytest.mark.parametrize(
    ("opcode", "unit"),
    [
        ("HMMA.16816.F32.BF16", "tensor"),
        ("F2FP.BF16.F32.PACK_AB", "integer"),
        ("IMAD.WIDE", "multiply"),
        ("PRMT", "integer"),
        ("LDGSTS.E.BYPASS.128", "global"),
        ("I2F.U8", "convert"),
        ("UIADD3", "uniform"),
        ("SHFL.BFLY", "shared"),
        ("BAR.SYNC.DEFER_BLOCKING", "control"),
    ],
)
def test_units(opcode, unit):
    assert kernel_model.unit_of(opcode) == unit


def test_occupancy_is_the_tightest_limit():
    card = CARDS["h200"]
    assert kernel_model.occupancy(card, kernel()) == 2  # 65536 / (256 · 128) registers
    assert kernel_model.occupancy(card, kernel(registers=32)) == 6  # 228 KiB of shared memory
    assert kernel_model.occupancy(card, kernel(registers=32, smem=0)) == 8  # 2048 threads
    # A warp's registers come in 256s: 1536 for 1312.
    assert kernel_model.occupancy(card, kernel(registers=41, smem=0)) == 5
    assert kernel_model.occupancy(card, kernel(threads=32, registers=16, smem=0)) == 32  # blocks


def test_the_slowest_resource_is_the_prediction():
    card, point = CARDS["h200"], Point("matmul", "triton", 4096, "x", 4096, 4096)
    found = kernel_model.predict(card, kernel(), point, weights_per_turn=8192, passes=32)
    assert found.per_weight["float"] == pytest.approx(2 * 256 / 8192)
    assert found.bound == "tensor"
    assert found.total == pytest.approx(point.flops / card.matmul_flops)
    few = Point("matmul", "triton", 1, "x", 4096, 4096)
    slow = kernel_model.predict(card, kernel(), few, weights_per_turn=16, passes=1)
    assert slow.bound == "load path"
    assert slow.seconds["load path"] == pytest.approx(
        slow.seconds["global"] + slow.seconds["shared"]
    )


def test_idle_cores_stretch_the_time():
    card, point = CARDS["h200"], Point("matmul", "triton", 4096, "x", 4096, 4096)
    half = kernel_model.predict(card, kernel(grid=(66,)), point, 8192, 32)
    assert half.waves == 2.0
    # Two blocks a multiprocessor: 264 at once.
    assert kernel_model.predict(card, kernel(grid=(200,)), point, 8192, 32).waves == 1.0
    more = kernel_model.predict(card, kernel(grid=(330,)), point, 8192, 32)
    assert more.waves == pytest.approx(2 / (330 / 264))


def test_floors_are_work_over_rate():
    """Lane-instructions of all weights, each time that they are decoded. An A100 has half of an
    H200's float lanes; to dequantize takes no tensor cores."""
    point = Point("matmul", "triton", 33, "x", 4096, 11008)
    for name, lanes in (("a100-80", 64), ("h200", 128), ("t4", 64)):
        card = CARDS[name]
        found = kernel_model.floors(card, point, {"float": 3.0}, 2, tensor=True)
        per_second = lanes * card.cores * card.clock_ghz * 1e9
        assert found["float"] == pytest.approx(3 * 2 * 4096 * 11008 / per_second)
        assert found["tensor"] == point.flops / card.matmul_flops
        assert "tensor" not in kernel_model.floors(card, point, {}, 2, tensor=False)
    flat = dataclasses.replace(point, op="dequantize", rows=0)
    assert "tensor" not in kernel_model.floors(card, flat, {}, 1, tensor=True)


def test_a_triton_tile_is_decoded_once_for_its_rows():
    point = Point("matmul", "triton", 33, "x", 4096, 11008)
    assert kernel_model.tile(TritonConfig(16, 32, 64), point, 1) == (32 * 64, 3)
    assert kernel_model.tile(TritonConfig(1, 8, 1024), point, 1) == (8 * 1024, 1)
    flat = dataclasses.replace(point, op="dequantize", rows=0)
    assert kernel_model.tile(TritonConfig(1, 1, 1024), flat, 64) == (4096 * 11008 / 64, 1)


def test_without_a_disassembler_the_error_says_what_to_install():
    point = Point("matmul", "triton", 1, "x", 4096, 4096)
    with pytest.raises(ValueError, match="nvidia-cuda-nvdisasm"):
        kernel_model.predict(CARDS["h200"], kernel(sass=None), point, 16, 1)


def test_of_a_hopper_kernel_the_tensor_instructions_say_what_a_warp_decodes():
    """The toy's loop holds one HGMMA: 256 weights of each of its warps."""
    card, point = CARDS["h200"], Point("matmul", "mosaic_gpu", 4096, "x", 4096, 4096)
    found = kernel_model.predict_mosaic(card, kernel(threads=384), point)
    assert found.per_weight["float"] == pytest.approx(2 * 32 / 256)
    assert found.per_weight["issue"] == pytest.approx(7 * 32 / 256)
    # 16 × 32 tiles of 256 × 128 on 132 multiprocessors: the busiest has four of 3.88.
    assert found.waves == pytest.approx(4 / (512 / 132))


def test_of_few_rows_several_share_an_instruction():
    """Two `HMMA` multiply the same weights with eight rows of x."""
    card, config = CARDS["h200"], GemvConfig()
    point = Point("matmul", "mosaic_gpu", 8, "x", 4096, 4096, config=config)
    code = kernel(SASS.replace("HGMMA.64x128x16", "HMMA.16816"))
    found = kernel_model.predict_mosaic(card, code, point)
    assert found.per_weight["float"] == pytest.approx(2 * 32 / 128)
    # 128 units of 32 rows on 132 multiprocessors.
    assert kernel_model.mosaic_split(point) == (1, pytest.approx(132 / 128))


def test_what_a_hopper_matmul_fetches():
    """For each of 512 tiles, 64 times: 256 × 64 of x in two bytes, and half a byte of 128 × 64."""
    point = Point("matmul", "mosaic_gpu", 4096, "x", 4096, 4096)
    assert kernel_model.cache_bytes(point) == 512 * 64 * (32768 + 4096)
    assert kernel_model.mosaic_split(point) == (16, pytest.approx(4 / (512 / 132)))
    # Of dx the columns are W's, and its rows are summed.
    back = Point("transposed", "mosaic_gpu", 4096, "x", 11008, 4096)
    assert kernel_model.cache_bytes(back) == 16 * 32 * 172 * (32768 + 4096)
    assert kernel_model.mosaic_split(back) == (16, pytest.approx(4 / (512 / 132)))
    split = dataclasses.replace(point, rows=32, config=MatmulConfig(rows=32, split=8))
    assert kernel_model.mosaic_split(split) == (1, pytest.approx(2 / (256 / 132)))


def test_what_a_team_fetches():
    """Weights in two bytes; 11 teams of 12 blocks fill the card. 6 of 20 leave a part of it idle,
    and have 22 tiles for four turns."""
    config = MatmulConfig(stages=4, team=True)
    point = Point("matmul", "mosaic_gpu", 12 * 256, "x", 22 * 128, 4096, config=config)
    assert kernel_model.cache_bytes(point) == 2 * 132 * 64 * (32768 + 16384)
    assert kernel_model.mosaic_split(point) == (12, 1.0)
    point = dataclasses.replace(point, rows=20 * 256)
    assert kernel_model.mosaic_split(point) == (20, pytest.approx(4 / (20 * 22 / 132)))
    # Of 25 tiles a fifth turn has the last one; all blocks would have done with four.
    wide = dataclasses.replace(point, n=25 * 128)
    assert kernel_model.mosaic_split(wide) == (20, pytest.approx(5 / (20 * 25 / 132)))


@pytest.mark.skipif(
    not (
        compile_for.gpu_compiler_available()
        and compile_for.find_tool("ptxas")
        and compile_for.find_tool("nvdisasm")
    ),
    reason=f"needs ptxas and nvdisasm, and the GPU compiler. {compile_for.PLUGIN_HINT}",
)
@pytest.mark.parametrize(
    ("implementation", "rows", "shape", "bound"),
    [
        ("triton", "1", "13b-gate-up", "load path"),
        ("mosaic_gpu", "1", "7b-down", "memory"),
        ("mosaic_gpu", "4096", "13b-gate-up", "tensor"),
    ],
)
def test_a_kernel_compiled_here_is_described(implementation, rows, shape, bound, capsys):
    # Shapes of its own: in one process Mosaic compiles equal kernels once, and then dumps no PTX.
    arguments = ["--rows", rows, "--shape", shape, "--implementation", implementation]
    assert kernel_model.main(["--card", "h200", *arguments]) == 0
    text = capsys.readouterr().out
    assert f"bound by {bound}" in text
    assert "lane-instructions per weight" in text
    assert "spills 0 B" in text
