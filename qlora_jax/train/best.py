"""Which evaluation was the best? The lowest held-out loss of a run, and how many came after it.

`patience` ends a run by it, `keep_best` keeps the adapter of that step. Both follow from the losses
in metrics.jsonl alone, so that a run that was killed goes on with what it knew.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Best:
    """The lowest held-out loss so far.

    Attributes:
      loss: in nats per token; infinite where there is none yet.
      step: whose it is.
      since: evaluations after it.
    """

    loss: float = math.inf
    step: int = 0
    since: int = 0

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]], upto: int) -> "Best":
        """That of a metrics.jsonl's lines, up to a step; what was found before the first step, of
        the base, does not count."""
        best = cls()
        for line in lines:
            if "eval_loss" in line and 0 < line["step"] <= upto:
                best.see(line["step"], line["eval_loss"])
        return best

    def see(self, step: int, loss: float) -> bool:
        """One more evaluation: whether it is the best."""
        if loss < self.loss:
            self.loss, self.step, self.since = loss, step, 0
            return True
        self.since += 1
        return False
