"""What of a run must be the same for it to go on, and what may be another; nothing is trained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from experiments import finetune, sweep
from experiments import run as runs
from experiments.cells import Cell, Sweep
from experiments.checks import Checked
from experiments.config import RunConfig, build_run
from experiments.rows import examples_of
from experiments.tree import read_yaml, to_yaml
from qlora_jax.train.run_folder import check_or_write_config, describe_run


class Begun(Exception):
    """The trainer was told all that it compares, and found nothing against it."""


@pytest.fixture
def begin(tmp_path, tiny_model, monkeypatch):
    """A call to begin, or go on with, the run of some options in one folder, as a process does."""

    def fit(model, batches, config, *, run_folder, identity, callbacks, **options):
        started = (run_folder / "config.json").exists()
        check_or_write_config(
            run_folder,
            describe_run(config, identity),
            started=started,
            defaults=options["identity_defaults"],
            free=options["identity_free"],
        )
        callbacks[0].start(int(started))
        raise Begun

    def check(run: RunConfig) -> Checked:
        folder = Path(run.model.source)
        return Checked(folder, *examples_of(run.data, folder, 512), None)

    monkeypatch.setattr(runs, "fit", fit)
    monkeypatch.setattr(runs, "check", check)
    monkeypatch.setattr(runs, "_load", lambda *_: (None, None))
    for looks_at_the_model in ("check_room", "told_of_idle_names", "loss_for"):
        monkeypatch.setattr(runs, looks_at_the_model, lambda *_, **__: None)

    def begun(**sections) -> None:
        examples_of.cache_clear()
        tree = {"model": {}, "data": {}, **sections}
        tree["model"] = {"source": str(tiny_model), **tree["model"]}
        tree["data"] = {"source": str(tmp_path / "my.jsonl"), "validation_rows": 2, **tree["data"]}
        run = runs.dated(build_run(tree, "here"), tmp_path)
        with pytest.raises(Begun):
            runs.execute(run, tmp_path, labels={})

    return begun


def write(folder: Path, outputs: list[str]) -> None:
    """Rows that are asked for words, and what each is to answer."""
    rows = ({"instruction": f"Say {i}.", "output": said} for i, said in enumerate(outputs))
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_other_rows_are_another_run(tmp_path, begin):
    write(tmp_path, list("abcdefgh"))
    begin()
    begin()
    write(tmp_path, list("abcdefgi"))
    with pytest.raises(ValueError, match=r"differ: rows\.\w+ \(was 'sha256:\w+', is 'sha256:"):
        begin()
    # One that was begun by a version that kept no rows in mind goes on as ever.
    file = tmp_path / "config.json"
    before = json.loads(file.read_text())
    del before["run"]["rows"]
    file.write_text(json.dumps(before))
    begin()


def test_a_run_keeps_the_date_that_its_template_writes(tmp_path, tiny_model, begin, monkeypatch):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "my.jsonl").write_text(4 * (json.dumps({"messages": turns}) + "\n"))
    sections = {"model": {"source": str(model)}, "data": {"format": "chat-template"}}
    monkeypatch.setattr(runs, "_today", lambda: "2026-11-30")
    begin(**sections)
    monkeypatch.setattr(runs, "_today", lambda: "2026-12-01")
    begin(**sections)
    sections["data"]["date"] = "2026-12-01"
    with pytest.raises(ValueError, match=r"data\.date \(was '2026-11-30', is .*rows\.training"):
        begin(**sections)


def test_switches_of_memory_may_be_turned(tmp_path, begin, capsys):
    write(tmp_path, list("abcdefgh"))
    dry = {"lora": {"lora_dropout": 0.0}}
    begin(**dry)
    switches = {"remat": "offload", "stream_weights": True, "attention": "xla", "mlp_tile": 64}
    begin(model=switches, train={"paged": False}, **dry)
    told = " ".join(capsys.readouterr().out.split())
    assert "going on with model.remat: offload, was full, model.stream_weights: True, was" in told
    assert told.endswith("the result is the same to rounding, but not to the bit.")
    assert "paged" not in told  # not a bit
    run = build_run(read_yaml(tmp_path / "config.yaml"), "the folder")
    assert not runs.is_finished(replace(run, model=replace(run.model, loss_chunk=None)), tmp_path)
    begin(model={"loss_chunk": None}, **dry)
    with pytest.raises(ValueError, match=r"differ: model\.embedding_bits \(was None, is 8\)\."):
        begin(model={"embedding_bits": 8}, **dry)


@pytest.mark.parametrize(
    ("ended", "patience", "finished"), [(30, 2, True), (30, 3, False), (40, 3, True)]
)
def test_a_run_that_was_out_of_patience_is_unfinished_with_another(
    ended, patience, finished, tmp_path
):
    train = {"steps": 40, "eval_every": 10, "patience": 2}
    (tmp_path / "config.yaml").write_text(to_yaml(build_run({"train": train}, "here")))
    (tmp_path / "result.json").write_text(json.dumps({"steps": ended}))
    run = build_run({"train": {**train, "patience": patience}}, "here")
    assert runs.is_finished(run, tmp_path) is finished


def test_tiles_are_another_run_where_units_are_dropped_by_tile(tmp_path, begin):
    write(tmp_path, list("abcdefgh"))
    begin(lora={"lora_dropout": 0.1})
    with pytest.raises(ValueError, match=r"differ: model\.mlp_tile \(was None, is 64\)\."):
        begin(model={"mlp_tile": 64}, lora={"lora_dropout": 0.1})


def test_both_commands_go_on_with_the_date_of_their_folder(tmp_path, tiny_model, monkeypatch):
    told, shown = [], []

    def execute(run, folder, **_):
        told.append(run.data.date)
        raise ValueError("that will do")

    def wandb_callbacks(project, folder, run):
        shown.append(run.data.date)
        return []

    monkeypatch.setattr(finetune, "wandb_callbacks", wandb_callbacks)

    for command in (finetune, sweep):
        monkeypatch.setattr(command, "execute", execute)
        monkeypatch.setattr(command, "check", lambda run: told.append(run.data.date))
    flags = ["--set", "data.format=chat-template", "--set", "data.source=my.jsonl"]
    flags += ["--set", f"model.source={tiny_model}", "--out", str(tmp_path)]
    dated = [*flags, "--set", "data.date=2026-11-30"]
    tree = finetune.read_run(finetune.make_parser().parse_args(dated))
    (tmp_path / "config.yaml").write_text(to_yaml(tree))
    assert finetune.main(flags) == 2
    assert shown[-1] == "2026-11-30"
    cell = Cell({"seed": "0"}, finetune.read_run(finetune.make_parser().parse_args(flags)))
    shutil.copytree(tmp_path, tmp_path / cell.name)
    assert sweep.plan(Sweep("s", (cell,)), tmp_path) == [cell]
    sweep.run_cell(cell, tmp_path / cell.name, Console(quiet=True))
    assert told == ["2026-11-30"] * 4
    with pytest.raises(ValueError, match=r"data\.date: 2026-12-01, was 2026-11-30"):
        runs.is_finished(replace(tree, data=replace(tree.data, date="2026-12-01")), tmp_path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"date": "30.11.2026", "format": "chat-template"},
            r"'30\.11\.2026' must be a day, as 2026",
        ),
        ({"date": "2026-11-30"}, "leave it out, or set data.format to chat-template"),
    ],
)
def test_what_is_no_date_or_no_templates_is_refused(data, words):
    with pytest.raises(ValueError, match=words):
        build_run({"data": data}, "here")
