"""What is read out of Nsight Compute's pages. The numbers are an H200's, of a gemv, rounded."""

import json

import jax
import pytest

from benchmarks import gpu_profile
from benchmarks._programs import op_function
from pallas_kernels import GemvConfig

RAW = {
    "Kernel Name": ("", "nf4_gemv_mosaic_gpu_kernel"),
    "gpu__time_duration.sum": ("us", "40.928"),
    "sm__cycles_elapsed.max": ("cycle", "73,324"),
    "sm__cycles_active.avg": ("cycle", "65,000"),
    "sm__cycles_elapsed.avg.per_second": ("Ghz", "1.77"),
    "l1tex__throughput.avg.pct_of_peak_sustained_active": ("%", "91.6"),
    "launch__registers_per_thread": ("register/thread", "223"),
    "device__attribute_multiprocessor_count": ("", "132"),
}
HEADER = [
    "Address",
    "Source",
    "# Samples",
    "L1 Tag Requests Global",
    "L1 Wavefronts Shared",
    "stall_long_sb",
    "stall_wait",
    "stall_long_sb (Not Issued)",
]
LOAD = ["0x0", "   LDG.E.NA.128 R20,  desc[UR16][R168.64]", "10", "2,904,000", "0", "4", "6", "9"]
LOOK_UP = ["0x10", "LDS R205, [R202+UR14]", "30", "0", "4,950,000", "24", "6", "9"]
SOURCE = [["Kernel Name", "nf4_gemv_mosaic_gpu_kernel"], HEADER, LOAD, LOOK_UP, ["a note"]]
PAGE = [list(RAW), [unit for unit, _ in RAW.values()], [value for _, value in RAW.values()]]


def test_a_report_is_read():
    (profile,) = gpu_profile.read(PAGE, SOURCE)
    assert profile.kernel == "nf4_gemv_mosaic_gpu_kernel"
    assert profile.counters["cycles"] == 73324
    assert "l2_percent" not in profile.counters  # not in this report: no 0 %
    assert (profile.lines, profile.shared) == (22000, 37500)
    assert profile.load_path == pytest.approx(59500 / 65000)
    assert profile.stalls == {"long_sb": 70.0, "wait": 30.0}
    first = {"index": 1, "text": "LDS R205, [R202+UR14]", "percent": 75.0, "reason": "long_sb"}
    assert profile.hottest[0] == first
    assert profile.hottest[1]["text"] == "LDG.E.NA.128 R20, desc[UR16][R168.64]"
    text = gpu_profile.describe(profile)
    assert "22000 lines + 37500 turns of shared memory = 92 % of 65000 active cycles" in text
    assert "l1 92 %" in text


def test_units_that_ncu_chose_by_size():
    page = [list(row) for row in PAGE]
    for name, unit, value in (
        ("gpu__time_duration.sum", "ms", "3.2"),
        ("sm__cycles_elapsed.avg.per_second", "Mhz", "990"),
    ):
        page[1][page[0].index(name)], page[2][page[0].index(name)] = unit, value
    (profile,) = gpu_profile.read(page, SOURCE)
    assert profile.counters["microseconds"] == pytest.approx(3200)
    assert profile.counters["ghz"] == pytest.approx(0.99)


def test_a_report_without_a_counter_is_refused():
    at = PAGE[0].index("sm__cycles_active.avg")
    page = [[*row[:at], *row[at + 1 :]] for row in PAGE]
    with pytest.raises(ValueError, match=r"has no sm__cycles_active\.avg: this version of ncu"):
        gpu_profile.read(page, SOURCE)


def test_kernels_and_their_code_are_told_apart():
    other = [["Kernel Name", "nvjet"], HEADER, ["0x0", "HGMMA", "5", "0", "13,200", "5", "0", "0"]]
    page = [*PAGE, ["nvjet", *PAGE[2][1:]]]
    gemv, product = gpu_profile.read(page, [*SOURCE, *other])
    assert (gemv.shared, product.shared) == (37500, 100)
    with pytest.raises(ValueError, match="zip"):
        gpu_profile.read(page, SOURCE)


def arguments(*more):
    return gpu_profile._parser().parse_args(["--out", "x.json", *more])


def test_a_config_goes_to_the_kernels_and_not_to_the_product():
    config = ("--config", json.dumps({"segments": 2}))
    found = gpu_profile.points(arguments("--implementations", "mosaic_gpu", "bf16", *config))
    assert [point.config for point in found] == [GemvConfig(segments=2), None]
    assert {(point.rows, point.n, point.k) for point in found} == {(1, 4096, 4096)}


def test_without_ncu_the_error_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        gpu_profile.main(["--out", str(tmp_path / "x.json")])
    assert "install NVIDIA Nsight Compute" in capsys.readouterr().err


def test_it_runs_itself_under_ncu(monkeypatch, tmp_path, capsys):
    """An `ncu` that leaves a report and prints its pages; then one that may not read counters."""
    pages = {"raw": PAGE, "source": SOURCE}
    for name, rows in pages.items():
        lines = [",".join(f'"{cell}"' for cell in row) for row in rows]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    ncu = tmp_path / "ncu"
    ncu.write_text(
        "#!/bin/sh\n"
        f'case "$*" in\n*--import\\ *--page\\ raw*) cat {tmp_path}/raw.csv ;;\n'
        f"*--import\\ *--page\\ source*) cat {tmp_path}/source.csv ;;\n"
        f'*) echo "$*" > {tmp_path}/command; '
        'while [ "$1" != -o ]; do shift; done; : > "$2" ;;\nesac\n'
    )
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    out = tmp_path / "results" / "profile.json"
    assert gpu_profile.main(["--out", str(out), "--rows", "4096"]) == 0
    assert "nf4_gemv_mosaic_gpu_kernel: 40.93 us" in capsys.readouterr().out
    assert json.loads(out.read_text())["profiles"][0]["lines"] == 22000
    command = (tmp_path / "command").read_text()
    assert "--clock-control none" in command
    assert "-m benchmarks.gpu_profile --child --out" in command
    assert "--rows 4096" in command
    ncu.write_text("#!/bin/sh\necho ERR_NVGPUCTRPERM >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        gpu_profile.main(["--out", str(out)])


@pytest.mark.parametrize("implementation", ["xla", "bf16"])
def test_a_point_runs_once(monkeypatch, implementation):
    monkeypatch.setitem(gpu_profile.SHAPES, "7b-qkvo", (128, 256))
    options = arguments("--implementations", implementation, "--op", "matmul", "transposed")
    calls = []

    def noted(point):
        run = op_function(point)

        def call(*arrays):
            jax.debug.callback(lambda: calls.append(point.op))
            return run(*arrays)

        return call

    monkeypatch.setattr(gpu_profile, "op_function", noted)
    gpu_profile.run_once(gpu_profile.points(options))
    jax.effects_barrier()
    assert calls == ["matmul", "transposed"]
