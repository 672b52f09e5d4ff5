"""benchmarks/gpu_bitsandbytes.py, with NumPy in the place of torch and bitsandbytes."""

import json
import sys
import types

import numpy as np
import pytest

from benchmarks import gpu_bitsandbytes
from benchmarks._points import Point


class Array(np.ndarray):
    """As much of a tensor as the benchmark asks of one."""

    def t(self):
        return self.T

    def contiguous(self):
        return self


@pytest.fixture(autouse=True)
def peers(monkeypatch):
    """Modules of these names, whose quantized weights are dense ones."""

    def randn(*shape, dtype, device):
        return np.random.default_rng(0).standard_normal(shape).view(Array)

    functional = types.SimpleNamespace(linear=lambda x, w: x @ w.T)
    torch = types.ModuleType("torch")
    bitsandbytes = types.ModuleType("bitsandbytes")
    parts = {"randn": randn, "matmul": np.matmul, "bfloat16": "bfloat16", "__version__": "0"}
    parts |= {"nn": types.SimpleNamespace(functional=functional)}
    parts |= {"cuda": types.SimpleNamespace(is_available=lambda: True)}
    vars(torch).update(parts)
    bitsandbytes.functional = types.SimpleNamespace(
        quantize_4bit=lambda dense, **_: (dense, None), dequantize_4bit=lambda codes, state: codes
    )
    bitsandbytes.matmul_4bit = lambda x, codes, quant_state: x @ codes
    bitsandbytes.__version__ = "0"
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "bitsandbytes", bitsandbytes)


@pytest.mark.parametrize("implementation", gpu_bitsandbytes.PEERS)
def test_each_op_is_timed_as_what_it_is(implementation):
    weight = np.random.default_rng(0).standard_normal((8, 16)) * 0.02
    x, dy, b = (np.random.default_rng(0).standard_normal(s) for s in ((3, 16), (3, 8), (8, 4)))
    wanted = {
        "matmul": x @ weight.T,
        "transposed": dy @ weight,
        "lora": x @ weight.T + x[:, :4] @ b.T,
    }
    for op, result in wanted.items():
        point = Point(op, implementation, 3, "toy", 8, 16, rank=4 * (op == "lora"))
        for call in gpu_bitsandbytes.calls_of(point, copies=2):
            np.testing.assert_allclose(call(), result)


def test_a_point_that_fails_costs_the_others_nothing(tmp_path, monkeypatch):
    def time_point(point):
        if point.op == "transposed":
            raise MemoryError("CUDA out of memory")
        return {"seconds": 1e-6, "fastest": 1e-6, "spread": 0.0, "calls": 1}

    monkeypatch.setattr(gpu_bitsandbytes, "time_point", time_point)
    arguments = ["--out", str(tmp_path), "--rows", "1", "--shapes", "7b-qkvo"]
    assert gpu_bitsandbytes.main(arguments) == 0
    points = json.loads((tmp_path / "bitsandbytes.json").read_text())["points"]
    status = {(p["op"], p["status"]) for p in points}
    assert status == {
        ("matmul", "ok"),
        ("transposed", "cannot run"),
        ("dequantize", "ok"),
        ("lora", "ok"),
    }
