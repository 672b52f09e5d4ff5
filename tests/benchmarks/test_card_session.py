"""A session on a borrowed card: pieces in turn, none of which can cost the others theirs."""

import json
import subprocess

import pytest

from benchmarks import card_session
from benchmarks.card_session import Piece


def test_a_failing_and_a_late_piece_cost_the_others_nothing(tmp_path, monkeypatch):
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(60)\n")
    (tmp_path / "writes.py").write_text(
        "import os, sys; open(sys.argv[1], 'w').write(' '.join(sys.argv[2:]) + os.environ['X'])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out.txt"
    wanted = [
        Piece("broken", ("no_such_module",), 1.0),
        Piece("late", ("sleeps",), 0.1, takes_budget=False),
        Piece("fine", ("writes", str(out)), 1.0, environment=(("X", "!"),)),
    ]
    report = tmp_path / "session.json"
    assert card_session.run(wanted, report, budget=20) == 1
    ended = {entry["name"]: entry["status"] for entry in json.loads(report.read_text())}
    assert ended == {"broken": "exit 1", "late": "late", "fine": "ok"}
    option, seconds = out.read_text().split()
    assert option == "--budget"
    assert 5 < int(seconds.rstrip("!")) < 20


def test_a_file_that_an_earlier_piece_did_not_write_is_not_asked_for(tmp_path, monkeypatch):
    """Without the kernels' rules the training steps still run, with the standing ones."""
    commands = []

    def note(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", note)
    (training,) = [p for p in card_session.pieces(tmp_path, 0.6) if p.name == "training"]
    rules = tmp_path / "rules.json"
    for there in (False, True):
        if there:
            rules.write_text("[]")
        assert card_session.run_piece(training, 10)["status"] == "ok"
        assert (str(rules) in commands[-1]) == there


def test_every_piece_is_a_benchmark_with_the_arguments_it_takes(tmp_path, capsys):
    for piece in card_session.pieces(tmp_path, 0.6):
        module = __import__(piece.arguments[0], fromlist=["main"])
        arguments = [*piece.arguments[1:], *(("--budget", "1") if piece.takes_budget else ())]
        arguments += map(str, piece.takes_file or ())
        # An argument it does not know would stop it before the help does.
        with pytest.raises(SystemExit) as stopped:
            module.main([*arguments, "--no-such-option"])
        assert stopped.value.code == 2
        assert "unrecognized arguments: --no-such-option\n" in capsys.readouterr().err


def test_an_unknown_piece_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        card_session.main(["--out", str(tmp_path), "--only", "kernel"])
    assert (
        "--only names kernel; there are floor, teams, cuts, profile, kernels, peer"
        in capsys.readouterr().err
    )


def test_cuts_are_measured_only_by_name(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(card_session, "run", lambda wanted, *_: names.append(wanted) or 0)
    card_session.main(["--out", str(tmp_path)])
    card_session.main(["--out", str(tmp_path), "--only", "cuts"])
    assert [piece.name for piece in names[0]][:2] == ["kernels", "peer"]
    assert [piece.name for piece in names[1]] == ["cuts"]
