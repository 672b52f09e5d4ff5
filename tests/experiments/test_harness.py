"""What the command of lm-evaluation-harness refuses, before a model is read."""

import pytest

from experiments import harness

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tasks", "no_such_task"], "--tasks no_such_task: Spec 'no_such_task' is not a"),
        (["--tasks", "broken.yaml"], "--tasks broken.yaml: "),
        (["--tasks", "arc_easy", "--include", "nowhere"], "there is no such folder"),
        (["--tasks", "arc_easy", "--limit", "0"], "--limit is 0, but 1 or more is needed"),
        (["--tasks", "arc_easy", "--shots", "-1"], "--shots is -1, but 0 or more is needed"),
    ],
)
def test_bad_input(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("task: [")
    assert harness.main(["stdlib-1m", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert not (tmp_path / "runs").exists()
