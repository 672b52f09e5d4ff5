"""What is written whole or not at all."""

import os
from pathlib import Path

import pytest

from qlora_jax.files import write_whole


@pytest.fixture
def written(tmp_path: Path) -> Path:
    file = tmp_path / "result.json"
    write_whole(file, "first")
    return file


def test_a_full_disk_leaves_the_earlier_file(written, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_whole(written, "second")
    assert written.read_text() == "first"
    assert list(written.parent.iterdir()) == [written]
    write_whole(written, "zweitens, größer")
    assert written.read_text(encoding="utf-8") == "zweitens, größer"


def test_a_kill_while_it_is_written_leaves_the_earlier_file(written, monkeypatch):
    def killed(path, text, **options):
        path.write_bytes(text.encode()[:1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            write_whole(written, "second")
    assert written.read_text() == "first"
    assert list(written.parent.iterdir()) == [written]
