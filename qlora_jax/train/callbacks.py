"""Where a run's numbers go: a small protocol, and its metrics.jsonl, TensorBoard and W&B.

A callback sees numbers only, at the step they belong to, in order. Steps are counted as finished
updates: step 1 is the state after the first. `log` is called with training metrics once per step
and with `eval_loss`, `eval_perplexity`, `eval_tokens` after an evaluation, and with what a `Probe`
found. A probe is the other direction: it is shown the model itself, every so many steps.
"""

import importlib.util
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from flax import nnx

from qlora_jax.files import write_whole


@runtime_checkable
class Callback(Protocol):
    """What `fit` tells the outside; a class that inherits it may leave methods out."""

    def start(self, step: int) -> None:
        """The run begins after `step` finished updates (0, or where it resumes)."""
        return

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step."""
        return

    def flush(self) -> None:
        """A checkpoint is about to be written: what was logged must be safe."""
        return

    def close(self) -> None:
        """The run ends, well or not."""
        return


@dataclass(frozen=True)
class Probe:
    """An examination of the model while it trains, beside the held-out loss.

    Attributes:
        every: steps between two; it also takes place after the last step.
        examine: (model, step) -> numbers by name, logged as they are; the model is only to be read.
    """

    every: int
    examine: Callable[[nnx.Module, int], Mapping[str, float]]


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each with its `step` and `elapsed_seconds`.

    The time is that of the whole run up to the line, in however many processes. On resuming, lines
    after the resumed step are cut off (they are computed again), and so is a last line that a
    killed process left unfinished; the time they took stays counted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None
        self._began = 0.0

    def start(self, step: int) -> None:
        """Keep the lines up to `step` (none where the run begins anew), open for appending."""
        found = read_lines(self.path) if step else []
        kept = [line for line in found if line["step"] <= step]
        self._began = time.perf_counter() - elapsed_seconds(found)
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        assert self._file is not None, "start() comes before log()"
        elapsed = round(time.perf_counter() - self._began, 3)
        self._file.write(json.dumps({"step": step, **values, "elapsed_seconds": elapsed}) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """To the disk, so that the file is never behind a checkpoint."""
        assert self._file is not None, "start() comes before flush()"
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; none where the file does not exist."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            # A process killed while writing leaves half a line, and only as the last one.
            break
    return lines


def elapsed_seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    """How long the run with these lines had taken when it wrote the last of them."""
    return float(lines[-1].get("elapsed_seconds", 0.0)) if lines else 0.0


class TensorBoard:
    """Event files for TensorBoard, written by tensorboardX (extra `tensorboard`)."""

    def __init__(self, folder: Path) -> None:
        """ModuleNotFoundError where tensorboardX is not installed; see `available`."""
        if not self.available():
            raise ModuleNotFoundError(
                "TensorBoard files need tensorboardX: pip install 'qlora-jax[tensorboard]'."
            )
        self.folder = folder
        self._writer: Any = None

    @staticmethod
    def available() -> bool:
        """Whether tensorboardX is installed."""
        return importlib.util.find_spec("tensorboardX") is not None

    def start(self, step: int) -> None:
        """Open a new event file; TensorBoard hides what an earlier one holds after `step`: all of
        it, where the run begins anew."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar per name, eval_x under eval/x, all others under train/."""
        for name, value in values.items():
            group, short = ("eval", name[5:]) if name.startswith("eval_") else ("train", name)
            self._writer.add_scalar(f"{group}/{short}", value, step)

    def flush(self) -> None:
        """To the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class WandB:
    """Weights & Biases (extra `wandb`); its account and server are configured as W&B documents."""

    def __init__(
        self,
        project: str,
        *,
        name: str,
        config: Mapping[str, Any] | None = None,
        id_file: Path | None = None,
    ) -> None:
        """A run `name` of `project`.

        Args:
            project: of the account that W&B is configured for.
            name: as it is shown there.
            config: shown beside.
            id_file: keeps the run's id, best in its folder: a run that begins anew gets a new one,
                one that goes on goes on there. Without it the name is the id, and whatever run of
                the project has it is resumed.
        """
        self._id_file = id_file
        self._arguments = {
            "project": project,
            "name": name,
            "id": name,
            "resume": "allow",
            "config": dict(config or {}),
        }
        self._run: Any = None

    def start(self, step: int) -> None:
        """Start or resume the run."""
        import wandb

        if self._id_file is not None and not step:
            self._id_file.write_text(f"{secrets.token_hex(4)}\n")
        if self._id_file is not None and self._id_file.is_file():
            self._arguments["id"] = self._id_file.read_text().strip()
        self._run = wandb.init(**self._arguments)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()
