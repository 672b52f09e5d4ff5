"""benchmarks/gpu_kernels.py runs in full without a card: toy sizes, kernels interpreted."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _points, _programs, _report, gpu_kernels
from benchmarks._points import Point


def run(tmp_path, *arguments: str) -> dict:
    gpu_kernels.main(
        ["--toy", "--out", str(tmp_path), "--repeats", "2", "--threads", "1", *arguments]
    )
    return json.loads((tmp_path / "kernels.json").read_text())


def test_runs_in_full_at_toy_sizes(tmp_path):
    results = run(tmp_path, "--shapes", "toy", "--implementations", "bf16", "xla", "triton")
    status = {point["label"]: point["status"] for point in results["points"]}
    assert set(status.values()) == {"ok"}, status
    assert {(p["op"], p["rows"]) for p in results["points"]} == {
        ("matmul", 1),
        ("matmul", 32),
        ("transposed", 32),
        ("transposed", 1),
        ("dequantize", 0),
    }
    assert all(p["seconds"] > 0 and p["bytes_per_s"] > 0 for p in results["points"])
    checked = [p for p in results["points"] if p["implementation"] != "bf16"]
    assert all(p["error_vs_float64"] < 1e-2 and p["error_vs_xla"] < 1e-2 for p in checked)
    assert results["ceilings"]["copy_bytes_per_s"] > 0
    assert results["meta"]["device"] == "cpu"
    assert (tmp_path / "roofline.png").stat().st_size > 1000
    table = (tmp_path / "kernels.md").read_text()
    assert "## matmul, 1 row" in table
    assert "## dequantize" in table


def test_a_spent_budget_leaves_valid_results(tmp_path):
    results = run(tmp_path, "--budget", "0")
    assert results["points"] == []
    assert (tmp_path / "kernels.md").exists()


def test_an_implementation_that_cannot_run_is_reported_not_fatal(tmp_path):
    arguments = ("--implementations", "nonsense", "--ops", "dequantize", "--shapes", "toy")
    (point,) = run(tmp_path, *arguments)["points"]
    assert point["status"] == "cannot run"
    assert "nonsense" in point["error"]
    assert "cannot run" in (tmp_path / "kernels.md").read_text()


def test_a_wrong_kernel_is_called_wrong(tmp_path, monkeypatch):
    honest = _programs.op_function

    def doubled(point):
        op = honest(point)
        return (lambda *args: 2 * op(*args)) if point.implementation == "xla" else op

    monkeypatch.setattr(_programs, "op_function", doubled)
    monkeypatch.setattr(gpu_kernels, "whole_error", lambda point: lambda *args: jnp.float32(0))
    arguments = ["--implementations", "xla", "--ops", "matmul", "--shapes", "toy", "--rows", "2"]
    base = ["--toy", "--out", str(tmp_path), "--repeats", "1", "--threads", "1"]
    assert gpu_kernels.main(base + arguments) == 1
    (point,) = json.loads((tmp_path / "kernels.json").read_text())["points"]
    assert point["status"] == "wrong"
    assert "**wrong**" in (tmp_path / "kernels.md").read_text()


@pytest.mark.parametrize("implementation", ["xla", "bf16"])
def test_every_call_of_a_program_stays_in_it(implementation):
    """Nothing merged, hoisted or dropped: as many products as copies times rounds."""
    point = Point("matmul", implementation, 2, "toy", 64, 128)
    program = _programs.Program(point, copies=3, rounds=2, launches=1)
    weights, x = _programs.make_weights(program, 0), _programs.make_input(point, 1)
    text = jax.jit(_programs.build(program)).lower(x, weights).compile().as_text()
    assert text.count(" dot(") + text.count("dot_fusion") + text.count("__onednn") >= 6


def test_host_weight_is_the_definition():
    point = Point("dequantize", "xla", 0, "toy", 64, 512)
    weight = _programs.packed_weight(jax.random.key(3), point.n, point.k, 64)
    dense = np.asarray(_programs.op_function(point)(None, *weight), np.float64)
    rows, columns = np.array([0, 5, 63]), np.array([0, 1, 63, 64, 511])
    exact = _programs.host_weight(point, weight, rows, columns)
    np.testing.assert_allclose(dense[np.ix_(rows, columns)], exact, rtol=2**-8)


def test_the_plan_puts_one_row_then_training_first():
    groups = list(_points.plan(["bf16", "triton"], _points.SHAPES))
    assert [(g[0].op, g[0].rows) for g in groups[:4]] == [
        ("matmul", 1),
        ("matmul", 4096),
        ("transposed", 4096),
        ("dequantize", 0),
    ]
    assert {p.rows for g in groups for p in g if p.op == "matmul"} == set(_points.ROWS)


def test_packed_bytes_are_four_and_an_eighth_bits():
    point = Point("matmul", "triton", 1, "7b-qkvo", 4096, 4096)
    assert 8 * point.weight_bytes / point.size == pytest.approx(4.127, abs=1e-3)


def test_roofline_without_points_is_no_plot(tmp_path):
    assert not _report.write_roofline({"points": []}, tmp_path / "none.png")
