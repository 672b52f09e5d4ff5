"""What an evaluation has found so far, in a file from which a killed one goes on.

JSON, a line each. The first line says what the findings depend on, so that another evaluation's are
never taken for this one's; every other is an item and what was found of it. Lines are added batch
by batch, and a kill leaves at most the last one unfinished, which is dropped.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_jax.files import write_whole
from qlora_jax.processes import on_first


class Record:
    """The findings so far, in memory and, where a path is given, in a file of the first process.

    Attributes:
        found: item → what was found of it; the same in every process.
    """

    def __init__(
        self, path: str | Path | None, identity: Mapping[str, Any], *, item: str, finding: str
    ) -> None:
        """Reads what an evaluation that was broken off has left, else begins the file.

        Args:
            path: of the file; None keeps findings in memory alone.
            identity: what they depend on, for JSON: the prompts, the model.
            item: the field of a line that names the item, a text.
            finding: the field that holds what `found` gives; a line may have others beside it.

        Raises:
            ValueError: the file is of another identity, or a line of it is damaged.
        """
        self.path = None if path is None else Path(path)
        self.item, self.finding = item, finding
        self.found: dict[str, Any] = on_first(lambda: self._read(identity))

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Notes the findings of a batch; every process does, and gives the same.

        Raises:
            OSError: they cannot be written; in the other processes a RuntimeError.
        """
        lines = list(lines)
        self.found |= {line[self.item]: line[self.finding] for line in lines}
        if self.path is not None:
            on_first(lambda: self._append(lines))

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(line)}\n" for line in lines))

    def _read(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """What was found before; the file is there afterwards, and ends in a whole line."""
        found: dict[str, Any] = {}
        if self.path is None:
            return found
        head = json.dumps({"examination": dict(identity)})
        lines = []
        if self.path.exists():
            # What is no UTF-8 makes a line no JSON, which is told below.
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        # A process that was killed while writing leaves its last line unfinished, or the first.
        unfinished = len(lines) == 1 and head.startswith(lines[0])
        if lines and lines[0] != head and not unfinished:
            raise ValueError(
                f"{self.path} holds the answers of another examination (other prompts or another "
                "model): delete it, and all is asked again, or give another file."
            )
        kept = lines[1:-1]
        for number, text in enumerate(kept, 2):
            try:
                line = json.loads(text)
                found[line[self.item]] = line[self.finding]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number} holds no answer to a {self.item}: delete the "
                    "line, and it is asked again."
                ) from error
        write_whole(self.path, "".join(f"{line}\n" for line in [head, *kept]))
        return found
