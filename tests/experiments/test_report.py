import csv
import io

import pytest

from experiments.cells import Cell
from experiments.config import RunConfig
from experiments.page import render
from experiments.report import (
    METRICS,
    RESULT,
    CellReport,
    csv_text,
    duration,
    read_cell,
    terminal_matrices,
    terminal_table,
)

CELL = Cell({"dataset": "chat", "model": "tiny", "seed": "0"}, RunConfig())
LINES = '{"step": 0, "eval_loss": 2.5}\n{"step": 1, "loss": 2.0}\n'


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


def test_scores_stand_beside_each_other_where_there_are_any():
    evaluation = {"loss": 2.0, "perplexity": 7.4, "tokens": 9}
    counts = dict.fromkeys(("steps", "trained_tokens", "tokens_per_second", "seconds"), 1)
    sizes = dict.fromkeys(("peak_host_memory_bytes", "adapter_parameters", "base_bytes"), 1)
    sizes["peak_device_memory_bytes"] = None
    plain = {"before": evaluation, "after": evaluation, **counts, **sizes}
    about = {"shots": 5, "questions": 57, "split": "val"}
    mmlu = {"mmlu": {"micro": 0.256, "macro": 0.25, **about}}
    results = [plain | mmlu | {"rouge_l": 0.181}, plain | {"rouge_l": 0.0}, plain | mmlu, plain]
    reports = [CellReport(CELL, "finished", result) for result in results]

    table = terminal_table("a test", reports)
    names = [column.header for column in table.columns]
    assert names[names.index("MMLU") + 1] == "ROUGE-L"
    cells = [list(column.cells) for column in table.columns if column.header in ("MMLU", "ROUGE-L")]
    assert cells == [["25.6", "–", "25.6", "–"], ["18.1", "0.0", "–", "–"]]
    titles = [str(matrix.title) for matrix in terminal_matrices("a test", reports)]
    assert titles == ["a test: MMLU, % right", "a test: ROUGE-L, %"]
    (matrix,) = terminal_matrices("a test", reports[3:])
    assert matrix.title == "a test: held-out loss after training"
    lines = csv.DictReader(io.StringIO(csv_text(reports)))
    found = [(line["mmlu_micro"], line["rouge_l"]) for line in lines]
    assert found == [("0.256", "0.181"), ("", "0.0"), ("0.256", ""), ("", "")]
    page = render("a test", reports, command="", about="")
    assert page.index("<h2>MMLU, %") < page.index("<h2>ROUGE-L, %") < page.index("<h2>Loss over")
    assert "<h2>ROUGE-L" not in render("a test", reports[2:], command="", about="")


def test_what_was_before_and_after_and_the_mean_over_seeds():
    def report(seed: int, after: float, **more) -> CellReport:
        names = ("steps", "trained_tokens", "tokens_per_second", "seconds", "base_bytes")
        names += ("peak_host_memory_bytes", "peak_device_memory_bytes", "adapter_parameters")
        result = {
            **{name: 100 + i for i, name in enumerate(names)},
            "before": {"loss": 4.0, "perplexity": 54.6, "tokens": 9},
            "after": {"loss": after, "perplexity": 7.4, "tokens": 9},
            **more,
        }
        cell = Cell({**CELL.labels, "seed": str(seed)}, RunConfig())
        return CellReport(cell, "finished", result)

    mmlu = {"mmlu": {"micro": 0.26, "macro": 0.25}}
    reports = [report(0, 2.0, **mmlu), report(1, 3.0), CellReport(CELL, "not run")]
    first, second, missing = csv.DictReader(io.StringIO(csv_text(reports)))
    assert (first["loss_before"], first["loss_after"]) == ("4.0", "2.0")
    assert (first["perplexity_before"], first["perplexity_after"]) == ("54.6", "7.4")
    assert (first["mmlu_micro"], first["mmlu_macro"]) == ("0.26", "0.25")
    assert (first["steps"], first["adapter_parameters"], first["base_bytes"]) == (
        "100",
        "107",
        "104",
    )
    assert (second["loss_after"], missing["loss_after"]) == ("3.0", "")
    table = terminal_table("a test", reports)
    shown = {column.header: list(column.cells) for column in table.columns}
    assert shown["before"][:2] == ["4.0000", "4.0000"]
    assert shown["after"][:2] == ["[bold]2.0000[/bold]", "[bold]3.0000[/bold]"]
    assert shown["change"][:2] == ["[green]−50.0 %[/]", "[green]−25.0 %[/]"]
    assert shown["perplexity"][:2] == ["54.6 → 7.4", "54.6 → 7.4"]
    assert shown["time"][:2] == ["1 min 43 s", "1 min 43 s"]
    page = render("a test", [report(0, 2.0), *reports[1:]], command="", about="")
    assert "2 of 3 cells finished, 1 not finished: 1 datasets" in page
    mean = '<span>4.000 → <b>2.500</b></span><span class="change down">−37.5 %</span>'
    assert page.count(mean) == 1
    (matrix,) = terminal_matrices("a test", [report(0, 2.0), report(1, 3.0), reports[-1]])
    assert [list(column.cells) for column in matrix.columns] == [["chat"], ["2.500"]]


def test_durations_are_rounded():
    shown = {4.26: "4.3 s", 59.4: "59.4 s", 59.6: "1 min 00 s", 119.6: "2 min 00 s"}
    shown |= {3599.6: "1 h 00 min", 7380: "2 h 03 min"}
    assert {seconds: duration(seconds) for seconds in shown} == shown
