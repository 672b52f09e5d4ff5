"""Trains the toy run in a process of its own and kills it, without warning, where told.

python -m tests.train.worker RUN_FOLDER log 7      # SIGKILL when step 7 is logged
python -m tests.train.worker RUN_FOLDER flush 10   # ... just before step 10 is saved
"""

import os
import signal
import sys
from pathlib import Path

from qlora_jax.train import FitResult, TrainConfig, fit
from tests.train.toy import Toy, ToyBatches, toy_loss

CONFIG = TrainConfig(
    steps=16,
    learning_rate=1e-2,
    schedule="linear",
    warmup_steps=2,
    weight_decay=0.01,
    micro_batch_size=4,
    gradient_accumulation_steps=2,
    page_min_size=0,
    save_every=5,
    keep_checkpoints=2,
    seed=3,
)


class Killer:
    """A callback that ends its own process."""

    def __init__(self, where: str, step: int):
        self.where, self.step, self.seen = where, step, 0

    def start(self, step):
        print(f"started after step {step}", flush=True)

    def log(self, step, values):
        self.seen = step
        self._maybe("log")

    def flush(self):
        self._maybe("flush")

    def close(self):
        pass

    def _maybe(self, where: str) -> None:
        if (where, self.seen) == (self.where, self.step):
            os.kill(os.getpid(), signal.SIGKILL)


def train(run_folder: Path, callbacks=(), config=CONFIG, **options) -> tuple[Toy, FitResult]:
    model = Toy(dropout=0.1)
    result = fit(
        model,
        ToyBatches(2, 4),
        config,
        run_folder=run_folder,
        loss_fn=toy_loss,
        callbacks=callbacks,
        **options,
    )
    return model, result


if __name__ == "__main__":
    train(
        Path(sys.argv[1]),
        [Killer(sys.argv[2], int(sys.argv[3]))],
        eval_batches=[ToyBatches(4).at(1000)],
    )
