"""benchmarks/gpu_memory.py at toy size: resident and streamed weights give the same losses."""

import json

import pytest

from benchmarks import gpu_memory
from qlora_jax.plan.compiled import CACHE_VARIABLE


def test_a_step_that_does_not_fit_leaves_its_plan(tmp_path, monkeypatch):
    def full(*_, **__):
        raise MemoryError("RESOURCE_EXHAUSTED")

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(gpu_memory, "measure", full)
    out = tmp_path / "memory.json"
    assert gpu_memory.main(["--toy", "--sequence", "16", "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    assert result["planned"]["total"] > 0
    assert "RESOURCE_EXHAUSTED" in result["error"]


@pytest.mark.slow
def test_a_toy_step_is_planned_and_measured(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    arguments = ["--toy", "--sequence", "16", "--steps", "1", "--out"]
    results = []
    for more in ([], ["--stream"]):
        out = tmp_path / "memory.json"
        assert gpu_memory.main([*arguments, str(out), *more]) == 0
        results.append(json.loads(out.read_text()))
    resident, streamed = results
    assert resident["planned"]["total"] > resident["planned"]["base"] > 0
    assert resident["measured"]["tokens_per_second"] > 0
    assert streamed["measured"]["tokens_per_second"] > 0
    # The plan's count of what crosses the bus is that of the step that ran.
    for found in results:
        assert found["planned"]["traffic"] == found["measured"]["host_bytes"]
    assert streamed["measured"]["host_bytes"] > resident["measured"]["host_bytes"]
    # A CPU counts no peak to compare with.
    assert all(found["plan_error"] is None for found in results)
    assert resident["measured"]["first_loss"] == streamed["measured"]["first_loss"]
