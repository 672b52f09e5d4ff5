"""The paper's sweeps by name: its table of hyperparameters, and the same at tiny scale."""

import os
import re

import pytest

from experiments import sweep
from experiments.cells import build_sweep
from experiments.embedded.paper_rows import write_rows
from experiments.presets import DATASETS, PRESETS, REAL_ROWS, SCALES, preset
from qlora_jax.data import INSTRUCT, load_instruct
from tests.shared import shared_path


def cells(name: str, **options):
    return build_sweep(preset(name, **options), name).cells


def published() -> dict[tuple[str, str], tuple]:
    """(dataset, scale) -> batch, rate, steps, source, target, as our notes on the paper have it."""
    text = shared_path("facts/paper.md").read_text()
    names = {"OASST1": ["oasst1"], "HH-RLHF": ["hh-rlhf"], "Longform": ["longform"]}
    others = [d for d in DATASETS if d not in ("oasst1", "hh-rlhf", "longform")]
    found, group = {}, others
    for line in re.findall(r"^\| (all others|OASST1|HH-RLHF|Longform|) ?\| (.*) \|$", text, re.M):
        group = {"all others": others, "": group}.get(line[0], names.get(line[0], group))
        columns = [column.strip() for column in line[1].split("|")]
        if len(columns) != 5 or not re.search("[0-9]e-4", columns[2]):
            continue
        scales, batch, rate, steps, lengths = columns
        source, target = lengths.split(" / ")
        for scale in scales.split(", "):
            for dataset in group:
                found[dataset, scale] = (
                    int(batch),
                    float(rate),
                    int(steps.replace(",", "")),
                    None if source == "–" else int(source),
                    int(target),
                )
    return found


def test_table_5_is_the_papers():
    expected = published()
    assert len(expected) == 32
    found = {}
    for cell in cells("paper-table5"):
        run = cell.run
        key = (cell.labels["dataset"], cell.labels["model"])
        lengths = (run.data.source_max_len, run.data.target_max_len)
        train = run.train
        found[key] = (train.batch_size, train.learning_rate, train.steps, *lengths)
        assert run.quant is not None
        assert (run.quant.quant_type, run.quant.double_quant) == ("nf4", True)
        assert (run.lora.r, run.lora.alpha) == (64, 16)
        assert run.lora.lora_dropout == (0.1 if key[1] in ("7B", "13B") else 0.05)
        assert (train.schedule, train.b2, train.max_grad_norm) == ("constant", 0.999, 0.3)
        assert run.data.group_by_length
        assert run.data.train_on == INSTRUCT[key[0]].train_on
        assert run.mmlu is not None
        assert (run.mmlu.split, run.mmlu.shots) == ("test", 5)
    assert found == expected


def test_table_4_is_three_data_types_of_two_datasets():
    found = cells("paper-table4")
    assert len(found) == 2 * 4 * 3
    kinds = {cell.labels["method"]: cell.run.quant for cell in found}
    assert kinds["BF16"] is None
    assert (kinds["FP4"].quant_type, kinds["FP4"].double_quant) == ("fp4", False)
    assert (kinds["NF4+DQ"].quant_type, kinds["NF4+DQ"].double_quant) == ("nf4", True)
    assert {cell.labels["dataset"] for cell in found} == {"alpaca", "flan-v2"}
    assert {cell.labels["model"] for cell in found} == set(SCALES)


def test_tiny_is_the_same_sweep_on_embedded_models(tmp_path):
    rows = shared_path("data/instruct")
    for name in PRESETS:
        full, tiny = preset(name), preset(name, "tiny", rows=rows)
        assert tiny["name"] == f"{name}-tiny"
        assert set(tiny["datasets"]) == set(full["datasets"])
        assert tiny.get("axes") == full.get("axes")
        for cell in build_sweep(tiny, name).cells:
            assert cell.run.model.source in ("stdlib-1m", "stdlib-4m")
            assert cell.run.train.steps == 6
            real = cell.labels["dataset"] in REAL_ROWS
            assert cell.run.data.files is not None
            assert cell.run.data.files.startswith(str(rows)) == real
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dataset", DATASETS)
def test_rows_that_have_to_be_made_are_in_the_originals_schemas(dataset, tmp_path):
    path = tmp_path / f"{dataset}.jsonl"
    write_rows(dataset, path)
    rows, form, train_on = load_instruct(dataset, path, cache_dir=tmp_path)
    assert len(rows) == 200
    for row in list(rows)[:20]:
        segments = form.segments(row, train_on)
        assert segments[-1].trained
        assert len("".join(segment.text for segment in segments)) > 20
    if dataset in REAL_ROWS:
        real = load_instruct(dataset, shared_path(f"data/instruct/{REAL_ROWS[dataset]}"))
        # The same loader reads both; FLAN's made rows are in the hub's schema.
        assert (real.form == form) == (dataset != "flan-v2")
        assert real.train_on == train_on


def test_made_rows_are_whole_or_not_there(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_rows("chip2", tmp_path / "chip2.jsonl")
    assert not (tmp_path / "chip2.jsonl").exists()


def test_the_command(tmp_path, capsys):
    assert sweep.main(["--preset", "paper-table5", "--dry-run", "--cards", "a6000", "h200"]) == 0
    printed = capsys.readouterr().out
    assert "paper-table5: 32 cell(s)" in printed
    assert re.search(
        r"oasst1 +65B +nf4\+DQ +1,875 +16 +\? +≤15\.4M +6\.18e18 +42\.2 +6\.0", printed
    )
    assert "a6000" in printed
    assert "h200" in printed
    for command, words in (
        (["--preset", "paper-table9"], "there is no preset 'paper-table9'; there are paper-table5"),
        (["--scale", "tiny"], "--scale is given, but belongs to --preset"),
        (["my.yaml", "--preset", "paper-table5"], "give either my.yaml or --preset"),
        (["--preset", "paper-table5", "--dry-run", "--cards", "abacus"], "Unknown card 'abacus'"),
    ):
        assert sweep.main(command) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_tiny_cell_from_end_to_end_without_real_rows(tmp_path, capsys):
    command = [
        "--preset", "paper-table5", "--scale", "tiny", "--rows", str(tmp_path / "none"),
        "--out", str(tmp_path / "out"), "--only", "oasst1--7B--*", "--set", "mmlu=null",
        "--set", "train.steps=2", "--set", "data.buckets=[128]", "--set", "data.max_rows=16",
        "--set", "data.target_max_len=127",
    ]  # fmt: skip
    assert sweep.main(command) == 0
    assert "1 cell(s), 1 to run" in capsys.readouterr().out
    assert (tmp_path / "out" / "rows" / "oasst1.jsonl").is_file()
    assert (tmp_path / "out" / "oasst1--7B--seed0" / "result.json").is_file()


@pytest.mark.slow
def test_table_5_to_the_end_at_tiny_scale(tmp_path, capsys):
    questions = shared_path("data/mmlu")
    flags = ["--set", "train.steps=2", "--set", "data.max_rows=16", "--models", "7B"]
    mmlu = ["--set", f"mmlu={{source: {questions}, split: val, shots: 0, limit: 1}}"]
    out = tmp_path / "out"
    command = ["--preset", "paper-table5", "--scale", "tiny", "--out", str(out), *flags, *mmlu]
    assert sweep.main(command) == 0
    printed = capsys.readouterr().out
    matrix = printed[printed.index("MMLU, % right") :]
    assert all(re.search(rf"{dataset} +│ +\d+\.\d", matrix) for dataset in DATASETS)
    page = (out / "report.html").read_text()
    assert "MMLU, % of questions answered rightly" in page
    assert "0-shot, 57 questions of the val split" in page
