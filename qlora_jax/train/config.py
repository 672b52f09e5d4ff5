"""What decides a training run besides its model and data: one frozen dataclass, and its optimizer.

The defaults are those of the QLoRA paper (arXiv 2305.14314, appendix B): a constant learning rate
of 2e-4, Adam with b2 = 0.999, gradients clipped to a global norm of 0.3, 16 examples per step.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import optax

from qlora_jax.fields import check_numbers
from qlora_jax.nn.lora import SEEDS
from qlora_jax.optim import (
    SCHEDULES,
    decay_mask,
    eight_bit,
    learning_rate_schedule,
    loraplus,
    master_weights,
    paged,
)

OPTIMIZERS = ("adamw", "adamw_8bit", "lion", "lion_8bit")

# How often a run looks at itself, when it has seen enough, and where its optimizer's state and
# gradients rest changes no bit of what it computes, and when in a step it updates nothing beyond
# rounding: free to differ on resuming.
FREE_ON_RESUME = frozenset(
    {
        "eval_every",
        "patience",
        "save_every",
        "keep_checkpoints",
        "log_every",
        "paged",
        "page_min_size",
        "gradients_on_host",
        "update_in_backward",
    }
)


def goes_further(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a run that was begun with the fields `before` may go on to more steps: its learning
    rate must not depend on how many there are."""
    constant = before.get("schedule") == after.get("schedule") == "constant"
    return constant and after["steps"] > before.get("steps", math.inf)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run's hyperparameters. A step is one optimizer update.

    Attributes:
      steps: optimizer updates in the whole run. With a constant schedule a run, finished or not,
        may be given more.
      optim: "adamw" or "lion"; with "_8bit", its moments rest as 8-bit codes.
      master_weights: keep a float32 copy of the adapters in the optimizer's state, and update that:
        for adapters of 16 bits, which alone would lose small updates to rounding.
      learning_rate: peak rate. Lion takes about a third to a tenth of AdamW's.
      loraplus_lr_ratio: rate of adapters' B over that of all else (LoRA+; its paper takes 16 with a
        lower learning_rate).
      schedule: "constant", "linear" or "cosine" decay after the warmup.
      warmup_steps: updates over which the rate rises from 0.
      micro_batch_size: examples whose activations are held at once.
      gradient_accumulation_steps: micro-batches per update; the update equals that of one batch
        of `micro_batch_size` times as many examples, weighted by tokens.
      max_grad_norm: clip gradients to this global norm; None does not clip.
      b1, b2: decay of the moments; Lion's authors take 0.9 and 0.99.
      eps: AdamW's.
      neftune_noise_alpha: noise on the embeddings of training batches (NEFTune; 5 to 15 in its
        paper), of decoders; None for none.
      weight_decay: decoupled, on all but biases and norms.
      paged: keep the optimizer's state in pinned host memory.
      page_min_size: state arrays with fewer elements stay on the device.
      gradients_on_host: where micro-batches accumulate, keep the sums of their gradients in pinned
        host memory (those of `page_min_size` elements or more).
      update_in_backward: update each layer's adapters in the backward pass, as their gradient
        arrives, so that the gradients of all layers are never held at once. Needs
        max_grad_norm=None, one micro-batch, and moments in 32 bits.
      seed: decides dropout, step by step (and, in the experiments, data order and adapters).
      eval_every: steps between evaluations; 0 evaluates only before and after the run.
      patience: the run ends after so many evaluations in a row without a lower held-out loss; 0
        for none. One that it has ended goes on with more patience.
      keep_best: keep the adapter of the lowest held-out loss, as of `eval_every`, in `best`.
      save_every: steps between checkpoints; 0 saves only at the end.
      keep_checkpoints: how many of the latest checkpoints are kept.
      log_every: steps between plain lines where the output is no terminal; metrics.jsonl has
        every step.

    Raises:
      ValueError: for a value outside its range, naming field and value.
    """

    steps: int = 1_000
    optim: str = "adamw"
    master_weights: bool = False
    learning_rate: float = 2e-4
    loraplus_lr_ratio: float = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0
    micro_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = 0.3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    neftune_noise_alpha: float | None = None
    paged: bool = True
    page_min_size: int = 100_000
    gradients_on_host: bool = False
    update_in_backward: bool = False
    seed: int = 0
    eval_every: int = 0
    patience: int = 0
    keep_best: bool = False
    save_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10

    def __post_init__(self) -> None:
        check_numbers(self)
        self._check_counts()
        self._check_optimizer()
        self._check_schedule()
        self._check_update_in_backward()

    def _check_counts(self) -> None:
        """Refuses numbers of steps, rows and so on that there cannot be."""
        at_least_one = (
            "steps",
            "micro_batch_size",
            "gradient_accumulation_steps",
            "keep_checkpoints",
            "log_every",
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("eval_every", "patience", "save_every", "page_min_size", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more.")
        if self.seed not in SEEDS:
            raise ValueError(f"seed={self.seed} must be 0 to {SEEDS[-1]}.")
        for name in ("patience", "keep_best"):
            if getattr(self, name) and not self.eval_every:
                raise ValueError(
                    f"{name}={getattr(self, name)} goes by evaluations during the run: set "
                    "eval_every to the steps between two."
                )

    def _check_optimizer(self) -> None:
        """Refuses an optimizer that is none, and numbers by which it would not work."""
        if self.optim not in OPTIMIZERS:
            raise ValueError(
                f"optim={self.optim!r} is unknown; expected one of {', '.join(OPTIMIZERS)}, whose "
                "state is paged by paged=True."
            )
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= self._single(name) < math.inf:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a finite number of 0 or more."
                )
        for name in ("b1", "b2"):
            if not 0 <= self._single(name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be in [0, 1), rounded to float32, too."
                )
        if not np.finfo(np.float32).tiny <= self._single("eps") < math.inf:
            raise ValueError(f"eps={self.eps} must be a finite number above 0, in float32, too.")
        if self.max_grad_norm is not None and not self._single("max_grad_norm") > 0:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} must be positive; None does not clip."
            )
        for name, plain in (
            ("loraplus_lr_ratio", "1 treats A and B alike"),
            ("neftune_noise_alpha", "None adds no noise"),
        ):
            value = getattr(self, name)
            if value is not None and not 0 < self._single(name) < math.inf:
                raise ValueError(f"{name}={value} must be a finite number above 0; {plain}.")

    def _check_schedule(self) -> None:
        """Refuses a schedule that is none, or is all warmup."""
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule={self.schedule!r} is unknown; expected one of {', '.join(SCHEDULES)}."
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be less than steps={self.steps}."
            )

    def _single(self, name: str) -> float:
        """A field as the optimizer computes with it: in float32, where 1e-50 is 0."""
        with np.errstate(over="ignore", under="ignore"):
            return float(np.float32(getattr(self, name)))

    def _check_update_in_backward(self) -> None:
        """Refuses what needs the gradients of all layers before the first update."""
        if not self.update_in_backward:
            return
        reasons = {
            f"max_grad_norm={self.max_grad_norm} needs all gradients first: set it to None": (
                self.max_grad_norm is not None
            ),
            f"gradient_accumulation_steps={self.gradient_accumulation_steps} needs several "
            "backward passes: set it to 1": self.gradient_accumulation_steps > 1,
            f"optim={self.optim!r} has 8-bit codes for state, which a backward pass cannot carry: "
            f"set it to {self.optim.removesuffix('_8bit')!r}": self.optim.endswith("_8bit"),
        }
        refused = [reason for reason, applies in reasons.items() if applies]
        if refused:
            raise ValueError(
                "update_in_backward=True updates each layer within the one backward pass, but "
                f"{'; '.join(refused)}, or leave update_in_backward out."
            )

    @property
    def batch_size(self) -> int:
        """Examples per optimizer update."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    @property
    def host_gradients(self) -> int | None:
        """`make_train_step`'s argument: from how many elements on sums of gradients rest there."""
        return self.page_min_size if self.gradients_on_host else None

    def learning_rates(self) -> optax.Schedule:
        """The learning rate as a function of finished updates."""
        return learning_rate_schedule(
            self.schedule,
            self.learning_rate,
            steps=self.steps,
            warmup_steps=self.warmup_steps,
        )

    def optimizer(self) -> optax.GradientTransformation:
        """Global-norm clipping, then the optimizer, its state paged where `paged` says so."""
        tx: optax.GradientTransformation
        decay = {"weight_decay": self.weight_decay, "mask": decay_mask}
        if self.optim.startswith("lion"):
            tx = optax.lion(self.learning_rates(), b1=self.b1, b2=self.b2, **decay)
        else:
            tx = optax.adamw(self.learning_rates(), b1=self.b1, b2=self.b2, eps=self.eps, **decay)
        if self.loraplus_lr_ratio != 1:
            tx = loraplus(tx, self.loraplus_lr_ratio)
        if self.optim.endswith("_8bit"):
            tx = eight_bit(tx)
        if self.master_weights:
            tx = master_weights(tx)
        if self.paged:
            tx = paged(tx, min_size=self.page_min_size)
        if self.max_grad_norm is None:
            return tx
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), tx)
