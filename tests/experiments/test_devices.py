"""A run over several devices is the run on one, to rounding; broken off, it ends with the same bits."""

import functools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import finetune, run
from experiments.config import DevicesConfig, RunConfig, build_run
from experiments.tree import read_yaml

FAST = [
    "train.steps=3", "train.micro_batch_size=4", "train.eval_every=2", "train.save_every=1",
    "train.gradient_accumulation_steps=2", "train.page_min_size=0", "lora.r=2",
    "lora.lora_dropout=0.1", "data.validation_rows=6", "data.max_rows=30", "data.buckets=[128]",
    "model.compute_dtype=float32", "model.embedding_bits=8", "data.source_max_len=96",
    "data.target_max_len=32", "mmlu.shots=0", "mmlu.split=val",
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
def finished(tiny_model, questions, tmp_path_factory):
    """(count, weights) → the folder of a finished run, each run once."""

    @functools.cache
    def finished(count, weights="whole", *more):
        folder = tmp_path_factory.mktemp("runs") / f"{count}-{weights}"
        assert finetune.main(command(folder, count, weights, *more)) == 0
        return folder

    def command(folder, count, weights, *more):
        settings = [*FAST, f"mmlu.source={questions}", f"devices.count={count}"]
        settings += [f"devices.weights={weights}", *more]
        flags = [flag for setting in settings for flag in ("--set", setting)]
        return ["--model", str(tiny_model), "--data", "describe", "--out", str(folder), *flags]

    finished.command = command
    return finished


def numbers(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss", line.get("eval_loss"))) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["cut", "whole"])
def test_losses_answers_and_adapters_are_those_of_one_device(finished, weights):
    one, many = finished(1), finished(4, weights)
    np.testing.assert_allclose(numbers(many), numbers(one), rtol=1e-5)
    adapters = [load_file(f / "adapter" / "adapter_model.safetensors") for f in (many, one)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, ours in adapters[0].items():
        # Adam's first steps are the signs of gradients: one near zero may turn with the rounding.
        np.testing.assert_allclose(ours, adapters[1][name], rtol=1e-3, atol=1e-5)
    results = [json.loads((f / "result.json").read_text()) for f in (many, one)]
    assert results[0]["mmlu"] == results[1]["mmlu"]
    assert [result["devices"] for result in results] == [4, 1]
