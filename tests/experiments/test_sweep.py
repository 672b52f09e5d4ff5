"""Both commands, end to end, on a Llama of random weights: skipping, failing, resuming."""

import csv
import gc
import json
import re
import signal
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from experiments import finetune, run, sweep
from experiments.cli import termination_interrupts
from experiments.folders import delete_run
from qlora_jax.checkpoints import read_adapter_config
from qlora_jax.train.run_folder import locked_run_folder

FAST = [
    "train.steps=3", "train.micro_batch_size=2", "train.eval_every=2", "train.save_every=1",
    "lora.r=2", "data.validation_rows=4", "data.max_rows=12", "data.buckets=[128]",
    "model.compute_dtype=float32", "data.source_max_len=96", "data.target_max_len=32",
]  # fmt: skip


def fast(*more: str) -> list[str]:
    return [flag for setting in (*FAST, *more) for flag in ("--set", setting)]


@pytest.fixture
def sweep_file(tmp_path: Path, tiny_model: Path) -> Path:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"name: small\nmodels: {{tiny: {tiny_model}}}\ndatasets: [describe, implement]\n"
        "axes: {method: {QLoRA: {}, LoRA-16: {quant: null}}}\n"
    )
    return file


def test_a_sweep_from_its_file_to_its_page(sweep_file, tmp_path, capsys):
    out = tmp_path / "out"
    command = [str(sweep_file), "--out", str(out), *fast()]
    assert sweep.main([*command, "--dry-run"]) == 0
    assert "4 cell(s)" in capsys.readouterr().out
    assert not out.exists()

    assert sweep.main(command) == 0
    printed = capsys.readouterr().out
    assert "4 cell(s), 4 to run" in printed
    folders = {f.name for f in out.iterdir() if f.is_dir()}
    assert folders == {
        f"{d}--tiny--{m}--seed0" for d in ("describe", "implement") for m in ("QLoRA", "LoRA-16")
    }
    cell = out / "describe--tiny--QLoRA--seed0"
    assert {"config.yaml", "metrics.jsonl", "adapter", "checkpoints", "result.json"} <= {
        f.name for f in cell.iterdir()
    }
    assert read_adapter_config(cell / "adapter").r == 2
    result = json.loads((cell / "result.json").read_text())
    other = json.loads((out / "describe--tiny--LoRA-16--seed0" / "result.json").read_text())
    assert result["base_bytes"] < other["base_bytes"]
    assert result["before"]["loss"] != other["before"]["loss"]
    assert result["steps"] == 3

    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished"] * 4
    assert float(rows[0]["loss_after"]) == result["after"]["loss"]
    check_page((out / "report.html").read_text(), cells=4)

    stamp = (cell / "result.json").stat().st_mtime_ns
    assert sweep.main(command) == 0
    assert "4 cell(s), 0 to run" in capsys.readouterr().out
    assert (cell / "result.json").stat().st_mtime_ns == stamp

    assert sweep.main([*command, "--set", "train.learning_rate=1"]) == 2
    assert "train.learning_rate: 1.0, was 0.0002" in capsys.readouterr().err


def check_page(text: str, *, cells: int) -> None:
    """Well-formed, self-contained, and with every panel."""

    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    balance = Balance()
    balance.feed(re.sub(r"<(line|circle|path)([^<>]*)/>", r"<\1\2></\1>", text))
    assert balance.open == []
    assert not re.search(r"https?://|src=|<script|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    assert text.count('class="held') == cells
    assert text.count("before, ") == cells + 1


def test_a_failing_cell_is_reported_and_the_rest_goes_on(sweep_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    names = ("lora.target_modules=[q_proj, vproj]",)
    command = [str(sweep_file), "--out", str(out), "--only", "describe*", *fast(*names)]
    load = run.load_pretrained

    def broken(folder, *, quant, **options):
        if quant is None:
            raise RuntimeError("no memory\nleft for [wandb] in [/tmp]")
        return load(folder, quant=quant, **options)

    monkeypatch.setattr(run, "load_pretrained", broken)
    assert sweep.main(command) == 1
    printed = capsys.readouterr().out
    # To the letter: brackets are markup to the console elsewhere.
    assert "failed: no memory left for [wandb] in [/tmp]" in printed
    assert "LoRA-16--seed0 failed: no memory left for [wandb] in [/tmp]" in printed
    assert "does not have: target_modules: vproj\n" in printed
    failed = out / "describe--tiny--LoRA-16--seed0"
    assert "Traceback" in (failed / "error.txt").read_text()
    assert (out / "describe--tiny--QLoRA--seed0" / "result.json").is_file()
    assert "no memory left" in (out / "results.csv").read_text()
    assert "no memory left" in (out / "report.html").read_text()

    monkeypatch.setattr(run, "load_pretrained", load)
    assert sweep.main(command) == 0
    assert "2 cell(s), 1 to run" in capsys.readouterr().out
    assert not (failed / "error.txt").exists()


def test_a_finished_run_goes_on_to_more_steps(tiny_model, tmp_path, capsys):
    out = tmp_path / "run"

    def command(steps: int, *more: str) -> list[str]:
        flags = ["--model", str(tiny_model), "--data", "describe", "--out", str(out)]
        return [*flags, *fast(f"train.steps={steps}", *more)]

    assert finetune.main(command(2)) == 0
    for name in ("mmlu.jsonl", "answers.partial.jsonl"):
        (out / name).write_text("of the model with two steps")
    assert finetune.main(command(4, "train.schedule=linear")) == 2
    told = capsys.readouterr().err
    assert "train.steps: 4, was 2" in told
    assert "train.schedule: linear, was constant" in told
    assert finetune.main(command(4)) == 0
    assert "resumed after step 2 of 4" in capsys.readouterr().out
    assert json.loads((out / "result.json").read_text())["steps"] == 4
    assert yaml.safe_load((out / "config.yaml").read_text())["train"]["steps"] == 4
    assert not {*out.glob("mmlu.jsonl"), *out.glob("answers.partial.jsonl")}
    assert finetune.main(command(4)) == 0
    assert "finished; --overwrite repeats it" in capsys.readouterr().out
    assert finetune.main(command(2)) == 2
    assert "train.steps: 2, was 4" in capsys.readouterr().err


def test_a_run_broken_off_ends_with_the_same_adapter(tiny_model, tmp_path, monkeypatch, capsys):
    def command(folder: Path) -> list[str]:
        flags = ["--model", str(tiny_model), "--data", "describe", "--out", str(folder)]
        return [*flags, *fast("lora.lora_dropout=0.1", "train.steps=4")]

    assert finetune.main(command(tmp_path / "whole")) == 0

    def stop(self, step, values):
        if step == 3 and "loss" in values:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run._FirstWords, "log", stop)
        assert finetune.main(command(tmp_path / "broken")) == 130
    told = capsys.readouterr()
    assert "interrupted: the same command goes on" in told.err
    assert "interrupted: step 3 is kept" in told.out
    assert not (tmp_path / "broken" / "result.json").exists()
    metrics = tmp_path / "broken" / "metrics.jsonl"
    lines = [json.loads(x) | {"elapsed_seconds": 5000} for x in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert finetune.main(command(tmp_path / "broken")) == 0
    assert "resumed after step 3" in capsys.readouterr().out
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "broken")
    ]
    assert adapters[0] == adapters[1]
    results = [
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "broken")
    ]
    for key in ("before", "after", "steps", "trained_tokens"):
        assert results[0][key] == results[1][key]
    # The time is that of both processes.
    assert results[0]["seconds"] < 5000 <= results[1]["seconds"]

    # The resolved configuration is the same run; a finished one is not repeated.
    again = ["--config", str(tmp_path / "whole" / "config.yaml"), "--out", str(tmp_path / "whole")]
    assert finetune.main(again) == 0
    assert "finished; --overwrite repeats it" in capsys.readouterr().out


def test_a_cell_of_another_process_is_left_alone(sweep_file, tmp_path, capsys):
    out = tmp_path / "out"
    command = [str(sweep_file), "--out", str(out), "--only", "describe--tiny--QLoRA*", *fast()]
    cell = out / "describe--tiny--QLoRA--seed0"
    # The folder of all cells is nobody's.
    with locked_run_folder(cell), locked_run_folder(out):
        assert sweep.main(command) == 1
    assert "left alone" in capsys.readouterr().out
    assert not (cell / "error.txt").exists()
    assert not (cell / "result.json").exists()


def test_a_cell_is_held_while_its_model_loads_and_while_it_is_examined(
    sweep_file, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    command = [str(sweep_file), "--out", str(out), "--only", "describe--tiny--QLoRA*", *fast()]
    cell = out / "describe--tiny--QLoRA--seed0"

    def beside(does):
        def both(*arguments, **options):
            with pytest.raises(RuntimeError, match="being written"), locked_run_folder(cell):
                pass
            return does(*arguments, **options)

        return both

    monkeypatch.setattr(run, "load_pretrained", beside(run.load_pretrained))
    monkeypatch.setattr(run, "final", beside(run.final))
    assert sweep.main(command) == 0
    assert "failed" not in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_says_how_to_go_on(sweep_file, tmp_path, monkeypatch, capsys, number):
    def stop(*arguments, **options):
        assert list(tmp_path.rglob("run.lock"))
        signal.raise_signal(number)

    monkeypatch.setattr(run, "load_pretrained", stop)
    handler = signal.getsignal(signal.SIGTERM)
    # A script's background processes begin with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert sweep.main([str(sweep_file), "--out", str(tmp_path / "out"), *fast()]) == 130
    signal.signal(signal.SIGINT, before)
    assert "interrupted: the same command goes on" in capsys.readouterr().err
    assert not list(tmp_path.rglob("run.lock"))
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_garbage_is_collected_is_not_lost(number):
    """JAX has Python call a function of its own then, out of which no exception comes."""
    sent = []

    def callback(phase, info):
        if not sent:
            sent.append(number)
            signal.raise_signal(number)

    def wait():
        gc.callbacks.append(callback)
        gc.collect()
        for _ in range(100):
            time.sleep(0.05)

    before, hook = signal.signal(signal.SIGINT, signal.default_int_handler), sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), termination_interrupts():
        wait()
    gc.callbacks.remove(callback)
    signal.signal(signal.SIGINT, before)
    assert sys.unraisablehook is hook


def test_a_run_of_another_version_goes_on_or_is_told_why_not(
    tiny_model, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    command = ["--model", str(tiny_model), "--data", "describe", "--out", str(out), *fast()]

    def stop(self, step, values):
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run._FirstWords, "log", stop)
        assert finetune.main(command) == 130
    # As a version without these options would have left it.
    settings = yaml.safe_load((out / "config.yaml").read_text())
    described = json.loads((out / "config.json").read_text())
    for section, name in (("model", "loss_chunk"), ("data", "group_by_length")):
        del settings[section][name], described["run"][section][name]
    del settings["rouge"]
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    (out / "config.json").write_text(json.dumps(described))
    assert finetune.main([*command, "--set", "data.group_by_length=false"]) == 2
    assert "data.group_by_length: False, was True" in capsys.readouterr().err
    # As a version with one more would have.
    (out / "config.yaml").write_text(yaml.safe_dump({**settings, "turbo": True}))
    assert finetune.main(command) == 2
    assert re.search("there is no option turbo.*--overwrite", capsys.readouterr().err)
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    assert finetune.main(command) == 0
    assert "resumed after step 2" in capsys.readouterr().out


def test_overwrite_deletes_runs_and_nothing_else(tiny_model, tmp_path, capsys):
    mine = tmp_path / "precious"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    flags = ["--model", str(tiny_model), "--data", "describe", "--out", str(mine), "--overwrite"]
    assert finetune.main([*flags, *fast()]) == 2
    assert "is not deleted" in capsys.readouterr().err
    assert (mine / "thesis.txt").exists()


def test_overwrite_deletes_what_ended_before_it_began(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "error.txt").write_text("it does not fit")
    (folder / "run.lock").touch()  # of a killed process
    delete_run(folder)
    assert not folder.exists()
