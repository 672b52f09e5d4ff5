"""Each mistake ends in one sentence and exit status 2, before anything is computed or written."""

import json
from pathlib import Path

import pytest

from experiments import finetune, run, sweep


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(run, "load_pretrained", refuse)


def sentence(capsys: pytest.CaptureFixture) -> str:
    """What stands on standard error: one line."""
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.out + captured.err
    return captured.err


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_data(tiny_model, tmp_path, capsys):
    odd = write_rows(tmp_path / "odd.jsonl", [{"question": "a", "reply": "b"}] * 300)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    few = write_rows(tmp_path / "few.jsonl", [{"input": "a", "output": "b"}] * 5)
    long = write_rows(tmp_path / "long.jsonl", [{"input": "a", "output": "b " * 700}] * 9)
    blank = write_rows(tmp_path / "blank.jsonl", [{"input": "a", "output": 3}] * 9)
    cases = [
        ([odd], "has the columns question, reply"),
        ([odd, "data.format=alpaca"], "needs instruction, output"),
        ([odd, "data.format=alpac"], "there is no prompt format 'alpac'"),
        ([empty], "is empty"),
        ([few], "5 rows, but 200 are to be held out"),
        ([few, "data.validation_split=test"], "test"),
        ([few, "data.validation_rows=1", "data.max_rows=0"], "empty"),
        ([long, "data.validation_rows=1", "data.target_max_len=null"], "at most 512 are allowed"),
        ([blank, "data.validation_rows=1"], "expects text in the column 'output'"),
        ([tmp_path / "absent.jsonl"], "does not exist"),
    ]
    for (data, *settings), words in cases:
        flags = [flag for setting in settings for flag in ("--set", setting)]
        command = ["--model", str(tiny_model), "--data", str(data), "--out", str(tmp_path / "o")]
        assert finetune.main([*command, *flags]) == 2
        assert words in sentence(capsys)
    assert not (tmp_path / "o").exists()


def test_models(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bare = tmp_path / "bare"
    bare.mkdir()
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text('{"model_type": "mamba"}')
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    short = tmp_path / "short"
    short.mkdir()
    for file in tiny_model.iterdir():
        content = file.read_bytes()
        cut = content[: len(content) // 2] if file.suffix == ".safetensors" else content
        (short / file.name).write_bytes(cut)
    cases = [
        (tmp_path / "nowhere", "neither a folder here nor"),
        (bare, "config.json"),
        (strange, "model_type 'mamba'"),
        (broken, "JSON"),
        (short, "is truncated"),
    ]
    for model, words in cases:
        command = ["--model", str(model), "--data", "describe", "--out", str(tmp_path / "o")]
        assert finetune.main(command) == 2
        assert words in sentence(capsys)
    assert not (tmp_path / "o").exists()


def test_options_and_files(tiny_model, tmp_path, capsys):
    typo = tmp_path / "typo.yaml"
    typo.write_text("train: {learning_rat: 1.0e-3}\n")
    for command in (finetune.main, sweep.main):
        flags = [str(typo)] if command is sweep.main else ["--config", str(typo)]
        assert command(flags) == 2
        assert "the nearest is train.learning_rate" in sentence(capsys)
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "not.yaml").write_text("a: [")
    for name, words in (
        ("list.yaml", "should hold keys and values"),
        ("not.yaml", "is not valid YAML"),
        ("no.yaml", "has list.yaml, not.yaml, typo.yaml"),
    ):
        assert sweep.main([str(tmp_path / name)]) == 2
        assert words in sentence(capsys)
    assert sweep.main(["--set", "steps"]) == 2
    assert "key=value" in sentence(capsys)
    assert sweep.main(["--models", str(tiny_model), "--only", "nothing-like-this"]) == 2
    assert "matches no cell" in sentence(capsys)


def test_output_folders(tiny_model, tmp_path, capsys):
    file = tmp_path / "a file"
    file.touch()
    data = ["--data", "describe", "--model", str(tiny_model)]
    assert finetune.main([*data, "--out", str(file / "run")]) == 2
    assert "cannot be written" in sentence(capsys)
    assert sweep.main(["--models", str(tiny_model), "--out", str(file / "runs")]) == 2
    assert "cannot be written" in sentence(capsys)
    assert file.read_text() == ""


def test_one_wrong_cell_refuses_the_sweep_before_the_first_runs(tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--models", str(tiny_model), str(tmp_path / "absent"), "--out", str(out)]
    assert sweep.main(command) == 2
    assert "neither a folder here nor" in sentence(capsys)
    assert not out.exists()
