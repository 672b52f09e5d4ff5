"""A run on several devices, or in several processes, is that of one, to rounding; broken off, it
ends with the same bits."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import finetune, run
from experiments.config import DevicesConfig, ModelConfig, RunConfig, build_run
from experiments.estimate import memory
from experiments.tree import read_yaml
from qlora_jax.plan import find_config
from qlora_jax.train import TrainConfig
from tests.processes import run_together

FAST = [
    "train.steps=3", "train.micro_batch_size=4", "train.gradient_accumulation_steps=2",
    "train.eval_every=2", "train.save_every=1", "train.page_min_size=0", "lora.r=2",
    "lora.target_modules=[q_proj, down_proj]", "lora.lora_dropout=0.1",
    "data.validation_rows=6", "data.max_rows=30", "data.buckets=[128]", "data.source_max_len=96",
    "data.target_max_len=32", "model.compute_dtype=float32", "mmlu.shots=0", "mmlu.split=val",
    "rouge.limit=5", "rouge.max_new_tokens=6", "rouge.batch_size=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmlu")
    for split in ("dev", "val"):
        (folder / split).mkdir()
        rows = "".join(f"Which is {n}?,1,2,3,4,{'ABCD'[n % 4]}\n" for n in range(5))
        (folder / split / f"virology_{split}.csv").write_text(rows)
    return folder


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """(count, weights) → the folder of a finished run, each run once."""

    @functools.cache
    def finished(count, weights):
        folder = tmp_path_factory.mktemp("runs") / f"{count}-{weights}"
        assert finetune.main(command(folder, count, weights)) == 0
        return folder

    return finished


@pytest.fixture(scope="module")
def command(tiny_model, questions):
    def command(folder, count, weights):
        own = [f"mmlu.source={questions}", f"devices={{count: {count}, weights: {weights}}}"]
        flags = [flag for setting in (*FAST, *own) for flag in ("--set", setting)]
        return ["--model", str(tiny_model), "--data", "describe", "--out", str(folder), *flags]

    return command


def numbers(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss", line.get("eval_loss"))) for line in lines]


def answers(folder):
    return (folder / "answers.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["cut", "whole"])
def test_losses_answers_and_adapters_are_those_of_one_device(finished, weights):
    one, many = finished(1, "whole"), finished(4, weights)
    np.testing.assert_allclose(numbers(many), numbers(one), rtol=1e-5)
    adapters = [load_file(f / "adapter" / "adapter_model.safetensors") for f in (many, one)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, ours in adapters[0].items():
        # Adam's first steps are the signs of gradients: one near zero may turn with the rounding.
        np.testing.assert_allclose(ours, adapters[1][name], rtol=1e-3, atol=1e-5)
    results = [json.loads((f / "result.json").read_text()) for f in (many, one)]
    for score in ("mmlu", "rouge_l"):
        assert results[0][score] == results[1][score]
    assert answers(many) == answers(one)
    assert [result["devices"] for result in results] == [4, 1]


@pytest.mark.slow
def test_a_run_broken_off_goes_on_to_the_same_bits_or_elsewhere_to_rounding(
    finished, command, tmp_path, monkeypatch, capsys
):
    def stop(self, step, values):
        if step == 3 and "loss" in values:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run._FirstWords, "log", stop)
        assert finetune.main(command(tmp_path / "same", 4, "cut")) == 130
    shutil.copytree(tmp_path / "same", tmp_path / "other")

    assert finetune.main(command(tmp_path / "same", 4, "cut")) == 0
    assert "going on" not in capsys.readouterr().out
    whole, same = finished(4, "cut"), tmp_path / "same"
    name = "adapter/adapter_model.safetensors"
    assert (same / name).read_bytes() == (whole / name).read_bytes()
    assert numbers(same) == numbers(whole)

    assert finetune.main(command(tmp_path / "other", 1, "whole")) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "begun on 4 devices (cut), going on with 1 device: the result is the same" in told
    np.testing.assert_allclose(numbers(tmp_path / "other"), numbers(whole), rtol=1e-5)
    saved = build_run(read_yaml(tmp_path / "other" / "config.yaml"), "the folder")
    assert saved.devices == DevicesConfig()


@pytest.mark.slow
def test_processes_are_one_run_and_go_on_to_the_same_bits(finished, command, tmp_path):
    """Each on a machine of its own, as far as files go: the first alone has the run's folder."""
    machines = tmp_path / "first", tmp_path / "second"
    for machine in machines:
        machine.mkdir()
    together = functools.partial(
        run_together, "experiments.finetune", command("runs/one", 4, "cut"), folders=machines
    )
    first, second = together()
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "held-out loss" in first.out
    assert "held-out loss" not in second.out
    folder, one = machines[0] / "runs" / "one", finished(1, "whole")
    np.testing.assert_allclose(numbers(folder), numbers(one), rtol=1e-5)
    name = "adapter/adapter_model.safetensors"
    trained = (folder / name).read_bytes()
    alone = load_file(one / name)
    for key, ours in load_file(folder / name).items():
        np.testing.assert_allclose(ours, alone[key], rtol=1e-3, atol=1e-5)
    results = [json.loads((f / "result.json").read_text()) for f in (folder, one)]
    for score in ("mmlu", "rouge_l"):
        assert results[0][score] == results[1][score]
    assert answers(folder) == answers(one)

    before = numbers(folder)
    for gone in ("adapter", "checkpoints/3"):
        shutil.rmtree(folder / gone)
    (folder / "result.json").unlink()
    first, second = together()
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "resumed after step 2 of 3" in first.out
    assert (folder / name).read_bytes() == trained
    assert numbers(folder) == before
    assert not (machines[1] / "runs" / "one").exists()


def test_processes_are_refused_together(command, tmp_path, capsys, monkeypatch):
    few = command(tmp_path / "run", 2, "whole")
    for ended in run_together("experiments.finetune", few, slurm=True):
        assert ended.status == 2
        told = "devices.count is 2, but the 2 processes of this run have 4 (cpu)"
        assert told in ended.err
    (tmp_path / "file").touch()
    first, second = run_together("experiments.finetune", command(tmp_path / "file", 4, "whole"))
    assert (first.status, second.status) == (2, 2)
    assert "run folder" in first.err
    assert "the first process stopped" in second.err
    assert finetune.main([*command(tmp_path, 4, "whole"), "--cluster", "node0/0/2"]) == 2
    assert "expected HOST:PORT/INDEX/COUNT" in capsys.readouterr().err

    def finds_none():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", finds_none)
    assert finetune.main([*command(tmp_path, 4, "whole"), "--cluster"]) == 2
    assert "JAX finds no cluster here" in capsys.readouterr().err


def test_what_the_machine_or_the_batch_does_not_allow_is_refused(command, tmp_path, capsys):
    assert finetune.main(command(tmp_path, 3, "whole")) == 2
    assert "devices.count=3 does not divide train.micro_batch_size=4" in capsys.readouterr().err
    many = command(tmp_path, 16, "cut")
    assert finetune.main([*many, "--set", "train.micro_batch_size=16"]) == 2
    assert "devices.count is 16, but this machine has 8 (cpu)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"devices in a test: count=0 must be at least 1\."):
        build_run({"devices": {"count": 0}}, "a test")


def test_a_dry_run_counts_each_devices_share():
    def held(**devices):
        run = RunConfig(
            model=ModelConfig(source="llama-7b"),
            train=TrainConfig(micro_batch_size=4),
            devices=DevicesConfig(**devices),
        )
        return memory(find_config("llama-7b"), run, 512)

    one, whole, cut = held(), held(count=4), held(count=4, weights="cut")
    assert (whole.base, whole.adapters) == (one.base, one.adapters)
    assert whole.host == 4 * one.host
    assert cut.host == one.host
    assert cut.base == pytest.approx(one.base / 4, rel=1e-6)
    assert cut.activations == whole.activations < one.activations
