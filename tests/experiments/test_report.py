import os

import pytest

from experiments.cells import Cell
from experiments.config import RunConfig
from experiments.report import METRICS, RESULT, read_cell, write_atomically

CELL = Cell({"dataset": "chat", "model": "tiny", "seed": "0"}, RunConfig())
LINES = '{"step": 0, "eval_loss": 2.5}\n{"step": 1, "loss": 2.0}\n'


def test_a_file_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    write_atomically(file, "first")

    def full(*paths):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(file, "second")
    assert file.read_text() == "first"
    write_atomically(file, "second")
    assert file.read_text() == "second"


def test_curves_of_a_finished_cell(tmp_path):
    (tmp_path / RESULT).write_text("{}")
    (tmp_path / METRICS).write_text(LINES)
    report = read_cell(CELL, tmp_path)
    assert report.status == "finished"
    assert (report.validation_curve, report.train_curve) == (((0, 2.5),), ((1, 2.0),))


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', "3", "null"])
def test_a_finished_cell_with_half_a_line_of_metrics_is_to_be_run_again(torn, tmp_path):
    (tmp_path / RESULT).write_text("{}")
    (tmp_path / METRICS).write_text(LINES + torn)
    report = read_cell(CELL, tmp_path)
    assert report.status == "failed"
    assert "metrics.jsonl, line 3" in report.error
    assert "delete the folder to run it again" in report.error
