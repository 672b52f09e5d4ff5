"""benchmarks/gpu_decode.py at toy size: every case writes, and is told under its own rules."""

import json

import pytest

from benchmarks import gpu_decode
from benchmarks.gpu_decode import Case
from pallas_kernels._table import rules


def test_a_toy_model_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_decode, "cases", lambda _: [Case("toy", "nf4", None, "after", 2)])
    assert gpu_decode.main(["--toy", "--repeats", "1", "--out", str(tmp_path)]) == 0
    (case,) = json.loads((tmp_path / "decode.json").read_text())["cases"]
    assert case["tokens_per_s"] == pytest.approx(2 / case["seconds_per_token"])
    assert case["weight_bytes"] > 0
    assert "| toy | nf4 | auto | after | 2 |" in (tmp_path / "decode.md").read_text()


def test_a_failing_case_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_decode, "cases", lambda _: [Case("toy", "nf4", "nonsense", "none", 1)])
    assert gpu_decode.main(["--toy", "--out", str(tmp_path)]) == 1
    (case,) = json.loads((tmp_path / "decode.json").read_text())["cases"]
    assert case["status"] == "failed"
    assert "nonsense" in case["error"]


def test_a_cases_rules_say_where_the_adapter_goes(tmp_path):
    """All rules, those of a file first."""
    measured = tmp_path / "rules.json"
    rule = {"op": "nf4_gemv", "card": "h200", "max_rows": 3, "implementation": "xla"}
    measured.write_text(json.dumps([rule | {"config": None}]))
    standing = len(rules())
    for where in gpu_decode.ADAPTERS:
        with gpu_decode._rules_for(Case("toy", "nf4", None, where, 1), measured):
            first, *rest = rules()[: standing + 1]
            assert (first.max_rows, len(rest)) == (3, standing)
            assert {rule.fuse_lora for rule in (first, *rest)} == {where == "inside"}
