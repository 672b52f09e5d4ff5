"""Two processes never write one run folder, and a dead one does not keep it."""

import fcntl
import json
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from qlora_jax.train import TrainConfig, run_folder
from qlora_jax.train.run_folder import check_or_write_config, describe_run, locked_run_folder


def test_a_held_folder_is_refused_and_freed_on_leaving(tmp_path):
    folder = tmp_path / "deep" / "run"
    with locked_run_folder(folder):
        with (
            pytest.raises(RuntimeError, match=r"being written by process \d+ on host"),
            locked_run_folder(folder),
        ):
            pass
        assert (folder / "run.lock").exists()
    assert not (folder / "run.lock").exists()
    with locked_run_folder(folder):
        pass


def test_a_lock_that_its_holder_took_away_meanwhile_is_not_held(tmp_path, monkeypatch):
    """Between our opening it and our locking it: the next process would find none, and lock its
    own."""
    flock, path = fcntl.flock, tmp_path / "run.lock"

    def holder_ends_first(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", holder_ends_first)
    with (
        locked_run_folder(tmp_path),
        pytest.raises(RuntimeError, match="being written"),
        locked_run_folder(tmp_path),
    ):
        pass


def test_an_error_inside_frees_the_folder(tmp_path):
    with pytest.raises(KeyError), locked_run_folder(tmp_path):
        raise KeyError
    with locked_run_folder(tmp_path):
        pass


def test_another_process_is_refused_while_its_holder_lives_and_not_after(tmp_path):
    # The holder is killed by its parent, so it cannot tidy up.
    code = (
        "import sys, time; from pathlib import Path\n"
        "from qlora_jax.train.run_folder import locked_run_folder\n"
        "with locked_run_folder(Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with (
                pytest.raises(RuntimeError, match=f"process {holder.pid} on host"),
                locked_run_folder(tmp_path),
            ):
                pass
        finally:
            holder.kill()
            holder.wait()
    assert (tmp_path / "run.lock").exists()
    with locked_run_folder(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["host"] == socket.gethostname()


@pytest.mark.parametrize("content", ["", '{"pid": 1', '{"pid": 999999}'])
def test_a_stale_lock_file_is_taken_over(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    with locked_run_folder(tmp_path):
        pass


def test_an_unfinished_run_of_another_host_and_an_older_version_is_refused(tmp_path):
    (tmp_path / "run.lock").write_text('{"pid": 7, "host": "elsewhere"}')
    with (
        pytest.raises(RuntimeError, match=r"process 7 on host elsewhere.*delete"),
        locked_run_folder(tmp_path),
    ):
        pass
    assert "elsewhere" in (tmp_path / "run.lock").read_text()


@pytest.fixture
def locks_that_do_not_reach(monkeypatch):
    """Of a file system's, other machines; and hasty holders."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(run_folder, "BEAT", 0.02)


def test_a_run_that_lives_on_another_host_is_refused(
    tmp_path, monkeypatch, locks_that_do_not_reach
):
    with locked_run_folder(tmp_path):
        monkeypatch.setattr(socket, "gethostname", lambda: "another")
        with (
            pytest.raises(RuntimeError, match=r"is being written by process \d+ on host"),
            locked_run_folder(tmp_path),
        ):
            pass


def test_a_run_that_died_under_another_host_name_is_taken_over(
    tmp_path, capsys, monkeypatch, locks_that_do_not_reach
):
    """As a container that is started anew has."""
    monkeypatch.setattr(run_folder, "SILENCE", 0.1)
    (tmp_path / "run.lock").write_text('{"pid": 7, "host": "elsewhere", "touched_every": 10.0}')
    with locked_run_folder(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["host"] == socket.gethostname()
    told = capsys.readouterr().err
    assert "by process 7 on host elsewhere, which did not finish, and shows no sign of" in told


def test_a_lock_that_is_taken_away_was_a_living_holders(tmp_path, monkeypatch):
    path = tmp_path / "run.lock"
    assert run_folder._is_touched(path)  # between our opening it and our looking at it
    path.touch()
    clock = SimpleNamespace(monotonic=lambda: 0, sleep=lambda _: path.unlink())
    monkeypatch.setattr(run_folder, "time", clock)
    assert run_folder._is_touched(path)


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"run folder .* cannot be written"),
        locked_run_folder(tmp_path / "file" / "run"),
    ):
        pass


def test_a_run_goes_on_after_fields_were_added(tmp_path):
    """What an older version did not write is what it did: the default."""
    written = describe_run(TrainConfig(steps=2, paged=False), {})
    for name in ("gradients_on_host", "master_weights", "optim"):
        del written["train"][name]
    check_or_write_config(tmp_path, written, started=False)
    check_or_write_config(tmp_path, describe_run(TrainConfig(2, paged=False), {}), started=True)
    other = describe_run(TrainConfig(2, paged=False, master_weights=True), {})
    with pytest.raises(ValueError, match=r"differ: master_weights \(was False, is True\)\."):
        check_or_write_config(tmp_path, other, started=True)


def test_only_how_a_run_is_watched_may_change(tmp_path):
    """And for how long, and where things rest, to the same bits, and when in a step it updates, to
    the same numbers but for rounding."""
    free = {"eval_every", "save_every", "keep_checkpoints", "log_every", "update_in_backward"}
    free |= {"paged", "page_min_size", "gradients_on_host", "patience"}
    begun = describe_run(TrainConfig(), {})
    check_or_write_config(tmp_path, begun, started=True)  # of which it was lost
    for name in begun["train"]:
        other = {**begun, "train": {**begun["train"], name: 1 if name == "steps" else "another"}}
        if name in free:
            check_or_write_config(tmp_path, other, started=True)
            continue
        with pytest.raises(ValueError, match=rf"these fields differ: {name} \(was "):
            check_or_write_config(tmp_path, other, started=True)


def test_a_run_may_get_more_steps_where_its_learning_rate_does_not_depend_on_them(tmp_path):
    def described(steps, **fields):
        return describe_run(TrainConfig(steps, **fields), {})

    check_or_write_config(tmp_path, described(4), started=False)
    check_or_write_config(tmp_path, described(6), started=True)
    with pytest.raises(ValueError, match=r"differ: steps \(was 6, is 8\)"):
        check_or_write_config(tmp_path, described(8), started=True, may_go_further=False)
    # Killed since, it is one of six steps.
    with pytest.raises(ValueError, match=r"differ: steps \(was 6, is 4\)"):
        check_or_write_config(tmp_path, described(4), started=True)
    with pytest.raises(ValueError, match=r"differ: steps \(was 6, is 8\), schedule"):
        check_or_write_config(tmp_path, described(8, schedule="linear"), started=True)
    other = tmp_path / "other"
    other.mkdir()
    check_or_write_config(other, described(4, schedule="cosine"), started=False)
    with pytest.raises(ValueError, match=r"differ: steps \(was 4, is 6\)"):
        check_or_write_config(other, described(6, schedule="cosine"), started=True)


def test_a_field_that_there_was_not_yet_is_one_that_is_not_set(tmp_path):
    before = {"train": {"steps": 2}, "run": {"model": {"source": "a"}}}
    check_or_write_config(tmp_path, before, started=False)
    grown = {"train": {"steps": 2, "new": None}, "run": {"model": {"source": "a", "bits": None}}}
    check_or_write_config(tmp_path, grown, started=True)
    # One that there is no more is one that is not set any more.
    with pytest.raises(ValueError, match=r"differ: model\.source \(was 'a', is None\)\."):
        check_or_write_config(tmp_path, {**before, "run": {"model": {}}}, started=True)
    grown["run"]["model"]["chunk"] = 512
    known = {"model": {"chunk": 512, "source": "b"}}
    check_or_write_config(tmp_path, grown, started=True, defaults=known)
    with pytest.raises(ValueError, match=r"model\.chunk \(was 256, is 512\)"):
        check_or_write_config(tmp_path, grown, started=True, defaults={"model": {"chunk": 256}})
    del grown["run"]["model"]["chunk"]
    grown["run"]["model"]["bits"] = 8
    with pytest.raises(ValueError, match=r"model\.bits \(was None, is 8\)"):
        check_or_write_config(tmp_path, grown, started=True)
