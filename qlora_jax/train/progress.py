"""What a person sees while a run goes on: a bar on a terminal, plain lines in a log file."""

from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressDisplay:
    """A callback that draws a bar with loss, tokens/s and time left, or prints plain lines.

    Args:
      total: steps of the whole run.
      console: where to; its kind (terminal or not) decides between bar and lines.
      log_every: steps between plain lines.
    """

    def __init__(self, total: int, *, console: Console, log_every: int) -> None:
        self._total, self._console, self._log_every = total, console, log_every
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )

    def start(self, step: int) -> None:
        """Show the bar, filled up to `step`."""
        if step:
            self.say(f"resumed after step {step} of {self._total}")
        if self._bar is not None:
            self._task = self._bar.add_task("train", total=self._total, numbers="", completed=step)
            self._bar.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Training numbers move the bar; an evaluation is said in a line of its own."""
        if "eval_loss" in values:
            self.say(
                f"step {step}: held-out loss {values['eval_loss']:.4f}, "
                f"perplexity {values['eval_perplexity']:.2f}"
            )
            return
        if "loss" not in values:
            self.say(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
            return
        rate = values.get("tokens_per_second")
        numbers = f"loss {values['loss']:.4f}" + (f" · {rate:,.0f} tokens/s" if rate else "")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step % self._log_every == 0 or step in (1, self._total):
            left = values.get("seconds_per_step", 0.0) * (self._total - step)
            eta = f" · {left:,.0f} s left" if left else ""
            self.say(f"step {step}/{self._total}: {numbers}{eta}")

    def say(self, text: str) -> None:
        """One plain line, above the bar where there is one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
