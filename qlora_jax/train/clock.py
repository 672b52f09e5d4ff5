"""How fast does a run go? Seconds per step, without what is no step: compiling, looking, saving."""

import time


class Clock:
    """Seconds per step and tokens per second, over steps that neither compiled nor waited."""

    def __init__(self) -> None:
        self._mark: float | None = None
        self._seconds, self._tokens, self._steps = 0.0, 0, 0

    def step_done(self, tokens: int) -> None:
        """A step has ended; 0 tokens: it is not to be counted."""
        now = time.perf_counter()
        if self._mark is not None and tokens:
            self._seconds += now - self._mark
            self._tokens += tokens
            self._steps += 1
        self._mark = now

    def pause(self) -> None:
        """What happened since the last step was no step."""
        self._mark = time.perf_counter()

    @property
    def tokens_per_second(self) -> float | None:
        """Mean so far; None before the first counted step."""
        return self._tokens / self._seconds if self._steps else None

    @property
    def seconds_per_step(self) -> float:
        """Mean so far; 0 before the first counted step."""
        return self._seconds / max(self._steps, 1)
