"""What of a run must be the same for it to go on, and what may be another; nothing is trained."""

import json
from pathlib import Path

import pytest

from experiments import run as runs
from experiments.checks import Checked
from experiments.config import RunConfig, build_run
from experiments.rows import examples_of
from qlora_jax.train.run_folder import check_or_write_config, describe_run


class Begun(Exception):
    """The trainer was told all that it compares, and found nothing against it."""


@pytest.fixture
def begin(tmp_path, tiny_model, monkeypatch):
    """A call to begin, or go on with, the run of some options in one folder, as a process does."""

    def fit(model, batches, config, *, run_folder, identity, identity_defaults, **_):
        check_or_write_config(
            run_folder,
            describe_run(config, identity),
            started=(run_folder / "config.json").exists(),
            defaults=identity_defaults,
        )
        raise Begun

    def check(run: RunConfig) -> Checked:
        return Checked(tiny_model, *examples_of(run.data, tiny_model, 512), None)

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
        with pytest.raises(Begun):
            runs.execute(build_run(tree, "here"), tmp_path, labels={})

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
