"""benchmarks/gpu_training.py at toy size, and its plan of cases."""

import argparse
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu_training
from benchmarks.gpu_training import Case


def test_a_toy_step_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_training, "cases", lambda options: [Case("toy", "nf4", None, 1, 2, 16)])
    assert gpu_training.main(["--toy", "--out", str(tmp_path), "--steps", "2"]) == 0
    (case,) = json.loads((tmp_path / "training.json").read_text())["cases"]
    assert case["status"] == "ok"
    assert case["tokens_per_s"] == pytest.approx(32 / case["seconds"])
    assert case["last_loss"] < case["first_loss"] < 7
    assert "| toy | nf4 | auto | 1 | 2 · 1 × 16 |" in (tmp_path / "training.md").read_text()


def test_a_failing_case_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gpu_training, "cases", lambda options: [Case("toy", "nf4", "nonsense", 1, 1, 16)]
    )
    assert gpu_training.main(["--toy", "--out", str(tmp_path)]) == 1
    (case,) = json.loads((tmp_path / "training.json").read_text())["cases"]
    assert case["status"] == "failed"
    assert "nonsense" in case["error"]


def test_cases_of_the_command_line():
    options = argparse.Namespace(
        models=["llama-7b"],
        bases=["nf4", "bf16"],
        matmuls=["auto", "triton"],
        batches=["1x512", "4x16x512"],
        devices=["1"],
    )
    found = gpu_training.cases(options)
    assert [case.label for case in found] == [
        "llama-7b nf4 auto 1x512",
        "llama-7b nf4 triton 1x512",
        "llama-7b nf4 auto 4x16x512",
        "llama-7b nf4 triton 4x16x512",
        "llama-7b bf16 xla 1x512",
        "llama-7b bf16 xla 4x16x512",
    ]
    assert found[2].tokens == 4 * 16 * 512
    options.devices = ["1", "2", "4-cut"]
    found = gpu_training.cases(options)[:3]
    assert [(case.devices, case.cut) for case in found] == [(1, False), (2, False), (4, True)]
    assert found[2].label == "llama-7b nf4 auto 1x512 on 4-cut"
    assert found[2].tokens == 4 * 512


@pytest.mark.slow
def test_devices_take_a_batch_each(tmp_path):
    arguments = ["--toy", "--bases", "nf4", "--matmuls", "auto", "--steps", "1"]
    arguments += ["--devices", "2", "2-cut", "--out", str(tmp_path)]
    assert gpu_training.main(arguments) == 0
    whole, cut, *_ = json.loads((tmp_path / "training.json").read_text())["cases"]
    assert cut["first_loss"] == pytest.approx(whole["first_loss"], rel=1e-3)
    assert cut["planned_device_bytes"] < whole["planned_device_bytes"]
    assert "| toy | nf4 | auto | 2-cut | 1 · 1 × 32 |" in (tmp_path / "training.md").read_text()


def test_devices_that_are_no_number_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_training.main(["--devices", "two", "--out", str(tmp_path)])
    assert "--devices names 'two'" in capsys.readouterr().err


def test_weights_are_made_packed_and_depend_on_the_name_alone():
    case = Case("toy", "nf4", None, 1, 1, 16)
    _, lora, frozen = gpu_training.make_model(case, "auto", rank=4)
    _, _, again = gpu_training.make_model(case, "auto", rank=4)
    codes = [leaf for leaf in jax.tree.leaves(frozen) if leaf.dtype == jnp.uint8]
    assert len(codes) == 2 * 7
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (frozen, again)), strict=True))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(lora))
