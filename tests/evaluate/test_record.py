"""What `test_mmlu` and `test_rouge` do not see of a record: several processes."""

from pathlib import Path

import pytest

from qlora_jax.evaluate import Record, record


def test_the_other_processes_write_nothing_and_learn_that_the_first_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, line = tmp_path / "found.jsonl", {"question": "a", "chosen": "B"}
    # As `processes.on_first` in another process than the first.
    monkeypatch.setattr(record, "on_first", lambda do: {})
    other = Record(path, {}, item="question", finding="chosen")
    other.add([line])
    assert other.found == {"a": "B"}
    assert not path.exists()

    def fails(do):
        raise RuntimeError("the first process stopped: OSError: No space left on device")

    monkeypatch.setattr(record, "on_first", fails)
    with pytest.raises(RuntimeError, match="No space left"):
        other.add([line])
