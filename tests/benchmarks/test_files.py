from pathlib import Path

import pytest

from benchmarks._files import put


def test_a_kill_while_results_are_written_leaves_the_earlier_ones(tmp_path, monkeypatch):
    file = tmp_path / "decode.json"
    put(file, "[1]")

    def killed(path, text, **options):
        path.write_bytes(text.encode()[:1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            put(file, "[1, 2]")
    assert file.read_text() == "[1]"
    put(file, "[1, 2]")
    assert [path.name for path in tmp_path.iterdir()] == ["decode.json"]
    assert file.read_text() == "[1, 2]"
