"""The steps of a run: dispatched, read, followed by looks and saves.

The device is kept busy: step n + 1 is dispatched before the metrics of step n are read, and its
batch is collated meanwhile. So a loss that is not finite is noticed one step late; but what is
saved was looked at first, and the checkpoints of a run that blew up are all from before.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, PyTree

from qlora_jax.data import IGNORE
from qlora_jax.evaluate import Evaluation, LossFn, evaluate, make_eval_step, split_adapters
from qlora_jax.models import check_remat, spread_rows, streaming
from qlora_jax.models.neftune import set_noise
from qlora_jax.processes import are_several
from qlora_jax.train.best import Best
from qlora_jax.train.callbacks import Callback, Probe
from qlora_jax.train.checkpoint import Checkpoints
from qlora_jax.train.clock import Clock
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.peak import peak_device_bytes, peak_host_bytes
from qlora_jax.train.run_folder import ADAPTERS, BEST
from qlora_jax.train.step import StepMetrics, init_state, make_train_step
from qlora_jax.train.traffic import HostTraffic, host_traffic


@runtime_checkable
class StepBatches(Protocol):
    """Training data: `data.Batches`, or anything that can say what step n sees."""

    def at(self, step: int) -> Any:
        """The batch of step 0, 1, …: leaves [batch, seq], or [accumulation, batch, seq]."""


@runtime_checkable
class EpochBatches(Protocol):
    """Evaluation data: `data.Batches(..., shuffle=False)`; a list of batches will do as well."""

    def one_epoch(self) -> Iterable[Any]:
        """All batches, in the same order each time; leaves [batch, seq]."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
      step: finished updates.
      train_loss: of the last update, before it; None where this call made none.
      first_eval, last_eval: held-out loss before the first update and after the last (None
        without evaluation data; `first_eval` also where this call resumed a run).
      best: the lowest held-out loss after an update; None without evaluation data.
      tokens_per_second: real (unpadded) tokens, targets included, over time in steps, without
        compiling; None where too few steps ran to tell.
      peak_host_bytes: resident set of this process at its largest, so far.
      peak_device_bytes: device memory at its largest; None where the backend does not tell.
      host_traffic: bytes that the last step moved between device and pinned host memory; None where
        this call made none. metrics.jsonl has the sum of every step as `host_bytes`.
    """

    step: int
    train_loss: float | None
    first_eval: Evaluation | None
    last_eval: Evaluation | None
    best: Best | None
    tokens_per_second: float | None
    peak_host_bytes: int
    peak_device_bytes: int | None
    host_traffic: HostTraffic | None


class Run:
    """The moving parts of one call of `fit`."""

    def __init__(
        self,
        model: nnx.Module,
        config: TrainConfig,
        loss_fn: LossFn,
        tx: optax.GradientTransformation,
        checkpoints: Checkpoints,
        outlets: Sequence[Callback],
        probes: Sequence[Probe],
        say: Callable[[str], None],
        keep_adapter: Callable[[Any, str], None],
        best: Best,
    ) -> None:
        set_noise(model, config.neftune_noise_alpha)
        graphdef, lora, self.frozen = split_adapters(model)
        if not jax.tree.leaves(lora):
            raise ValueError(
                "The model has no nnx.LoRAParam to train; build or load it with a LoraConfig."
            )
        if config.update_in_backward and hasattr(model, "remat"):
            check_remat(model.remat, update_in_backward=True)
        self.config, self.checkpoints, self.outlets = config, checkpoints, outlets
        self.state = init_state(lora, tx, seed=config.seed)
        self.resumed = checkpoints.latest_step() is not None
        if self.resumed:
            self.state = checkpoints.restore(self.state)
        options = streaming.options_for(model)
        self.train_step = make_train_step(
            graphdef,
            tx,
            loss_fn,
            learning_rate=config.learning_rates(),
            host_gradients=config.host_gradients,
            update_in_backward=config.update_in_backward,
            state=self.state,
            compiler_options=options,
        )
        self.eval_step = make_eval_step(graphdef, loss_fn, compiler_options=options)
        self.vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        self.graphdef, self.probes, self.say = graphdef, probes, say
        self.keep_adapter, self.best = keep_adapter, best
        self.clock = Clock()
        # What the program of each shape of batches moves over the bus; a new shape compiles one.
        self.compiled: dict[Any, HostTraffic] = {}
        self.traffic: HostTraffic | None = None
        # Dispatched steps whose metrics were not read yet: (step, metrics, real tokens, traffic).
        self.unread: collections.deque[tuple[int, StepMetrics, int, HostTraffic]]
        self.unread = collections.deque()
        # The last step to have been read, and the last with all that follows a step.
        self.read = self.done = int(self.state.step)
        self.train_loss: float | None = None
        # The step at which the run ends.
        self.last = self.done if self.is_out_of_patience else config.steps

    def train(
        self, batches: StepBatches, eval_batches: EpochBatches | Sequence[Any] | None
    ) -> FitResult:
        """All steps from where the state stands to the last."""
        config, first = self.config, int(self.state.step)
        for outlet in self.outlets:
            outlet.start(first)
        epoch = getattr(batches, "steps_per_epoch", None)
        if epoch is not None and not self.resumed:
            self.say(
                f"{config.steps:,} steps of {config.batch_size} rows = {config.steps / epoch:.2f} "
                f"epochs of {epoch:,} steps"
            )
        evaluations = []
        if eval_batches is not None and not self.resumed:
            evaluations.append(self.evaluate(eval_batches, first))
        try:
            step = first
            while step < self.last:
                step += 1
                self.dispatch(step, _stacked(batches.at(step - 1), config))
                if eval_batches is not None and self.due(step, config.eval_every):
                    evaluations.append(self.evaluate(eval_batches, step))
                for probe in self.probes:
                    if self.due(step, probe.every):
                        self.probe(probe, step)
                if self.due(step, config.save_every):
                    self.save(step)
                self.done = step
        except KeyboardInterrupt:
            self.keep(config.eval_every if eval_batches is not None else 0)
            raise
        if eval_batches is not None and first >= self.last:
            # Already on record: a finished run's files do not change.
            evaluations.append(self.held_out(eval_batches))
        return FitResult(
            step=int(self.state.step),
            train_loss=self.train_loss,
            first_eval=evaluations[0] if evaluations and not self.resumed else None,
            last_eval=evaluations[-1] if evaluations else None,
            best=self.best if self.best.step else None,
            tokens_per_second=self.clock.tokens_per_second,
            peak_host_bytes=peak_host_bytes(),
            peak_device_bytes=peak_device_bytes(),
            host_traffic=self.traffic,
        )

    def dispatch(self, step: int, batch: Any) -> None:
        """Start one step, then read the metrics of the one before."""
        _check_ids(batch, self.vocabulary, step)
        shape = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
        rows = spread_rows(batch, self.state.lora, axis=1)
        compiles = shape not in self.compiled
        if compiles:
            # Such a step is waited for and not timed.
            self.report()
            traffic = host_traffic(self.train_step, self.state, self.frozen, rows)
            if traffic.total and not self.compiled:
                self.say(f"host traffic a step: {traffic}")
            self.compiled[shape] = traffic
        self.traffic = self.compiled[shape]
        self.state, metrics = self.train_step(self.state, self.frozen, rows)
        tokens = 0 if compiles else _real_tokens(batch)
        self.unread.append((step, metrics, tokens, self.traffic))
        self.report(but=0 if compiles else 1)

    def report(self, but: int = 0) -> None:
        """Read, check and log the metrics of all dispatched steps but the latest few; waits until
        they are done."""
        while len(self.unread) > but:
            step, metrics, tokens, traffic = self.unread[0]
            values = {name: float(x) for name, x in jax.device_get(metrics)._asdict().items()}
            # Not before: the wait may be interrupted, and the step be read then (`keep`).
            self.unread.popleft()
            self.read = step
            self.report_step(step, values, tokens, traffic)

    def report_step(
        self, step: int, values: dict[str, float], tokens: int, traffic: HostTraffic
    ) -> None:
        """Check and log the metrics of one step."""
        values["tokens"] = int(values["tokens"])
        self.clock.step_done(tokens)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise FloatingPointError(
                f"Training stopped at step {step}: loss is {values['loss']} and the gradient norm "
                f"is {values['grad_norm']}. {self.last_good()}"
            )
        self.train_loss = values["loss"]
        if self.clock.tokens_per_second is not None:
            values["tokens_per_second"] = round(self.clock.tokens_per_second, 1)
            values["seconds_per_step"] = round(self.clock.seconds_per_step, 6)
        if traffic.total:
            values["host_bytes"] = traffic.total
        self.log(step, values)

    def evaluate(self, batches: EpochBatches | Sequence[Any], step: int) -> Evaluation:
        """Held-out loss of the state after `step`, logged and compared with those before."""
        self.report()
        found = self.held_out(batches)
        self.log(step, {f"eval_{name}": value for name, value in found._asdict().items()})
        if step and self.best.see(step, found.loss) and self.config.keep_best:
            self.keep_adapter(self.state.lora, BEST)
        if self.is_out_of_patience and step < self.last:
            self.last = step
            self.say(
                f"the run ends at step {step}: the held-out loss was lowest at step "
                f"{self.best.step}, and {self.best.since} evaluations since were not lower"
            )
        self.clock.pause()
        return found

    @property
    def is_out_of_patience(self) -> bool:
        """Whether there were as many evaluations without a better one as there may be."""
        return 0 < self.config.patience <= self.best.since

    def probe(self, probe: Probe, step: int) -> None:
        """The numbers of one examination, logged."""
        self.report()
        model = nnx.merge(self.graphdef, self.state.lora, self.frozen)
        found = probe.examine(model, step)
        # A number may be an array's, which no file of JSON takes.
        self.log(step, {name: np.asarray(value).item() for name, value in found.items()})
        self.clock.pause()

    def held_out(self, batches: EpochBatches | Sequence[Any]) -> Evaluation:
        """Held-out loss of the state."""
        epoch = batches if isinstance(batches, Sequence) else batches.one_epoch()
        return evaluate(self.eval_step, self.state.lora, self.frozen, epoch)

    def save(self, step: int) -> None:
        """Checkpoint the state after `step`, once it is known to be finite."""
        self.report()
        if not _all_finite(self.state.lora):
            raise FloatingPointError(
                f"Training stopped at step {step}: its update made adapters NaN or infinite. "
                f"{self.last_good()}"
            )
        for outlet in self.outlets:
            outlet.flush()
        self.checkpoints.save(self.state)
        if step < self.last:  # the caller keeps the last
            self.keep_adapter(self.state.lora, f"{ADAPTERS}/{step}")
        self.clock.pause()

    def keep(self, eval_every: int) -> None:
        """Checkpoint the state that an interrupt has found, so that no step is lost.

        Not where it is in use, by a step or by other processes, nor where something else belongs
        to its step, which a run that goes on from it would leave out.
        """
        if are_several() or any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
            return
        step = int(self.state.step)
        known = self.unread[-1][0] if self.unread else self.read
        every = (eval_every, *(probe.every for probe in self.probes))
        complete = step == self.done or not any(self.due(step, each) for each in every)
        if step == known and complete and step not in (0, self.checkpoints.latest_step()):
            self.save(step)
            self.say(f"interrupted: step {step} is kept")

    def due(self, step: int, every: int) -> bool:
        """Whether something that is done every so many steps, and at the end, is now."""
        return step == self.last or (every > 0 and step % every == 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """To every outlet."""
        for outlet in self.outlets:
            outlet.log(step, values)

    def last_good(self) -> str:
        """What is left after a run blew up, in words."""
        step = self.checkpoints.latest_step()
        kept = (
            "No checkpoint was written before it"
            if step is None
            else f"The last good checkpoint, step {step}, is kept in {self.checkpoints.folder}"
        )
        return (
            f"{kept}; load the model anew, and try a lower learning_rate or a warmup in a new run "
            "folder."
        )


@jax.jit
def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _stacked(batch: Any, config: TrainConfig) -> Any:
    """The batch with leaves [accumulation, micro batch, ...]; ValueError for another shape."""
    accumulation, micro = config.gradient_accumulation_steps, config.micro_batch_size

    def stacked(leaf: Any) -> Any:
        shape = np.shape(leaf)
        if accumulation == 1 and shape[:1] == (micro,):
            return leaf[None]
        if shape[:2] == (accumulation, micro):
            return leaf
        raise ValueError(
            f"A batch has a leaf of shape {list(shape)}, but gradient_accumulation_steps="
            f"{accumulation} and micro_batch_size={micro} need [{accumulation}, {micro}, ...]; "
            "make the batches with the same two numbers."
        )

    return jax.tree.map(stacked, batch)


def _check_ids(batch: Any, vocabulary: int | None, step: int) -> None:
    """Refuses token ids that the model has no rows for, of which an embedding makes NaN, or another
    token's row."""
    for name in ("input_ids", "labels"):
        ids = getattr(batch, name, None)
        if vocabulary is None or not isinstance(ids, np.ndarray) or ids.dtype.kind != "i":
            continue
        ignored = (ids == IGNORE) & (name == "labels")
        wrong = ids[((ids < 0) & ~ignored) | (ids >= vocabulary)]
        if wrong.size:
            raise ValueError(
                f"step {step} reads {name} with {wrong[0]}, but the model knows the {vocabulary} "
                "tokens from 0 on: tokenize with its own tokenizer, or add tokens (ql.add_tokens)."
            )


def _real_tokens(batch: Any) -> int:
    """Tokens of a batch without its padding: its own `real_tokens`, or those of its attention_mask;
    all elements where it has neither."""
    if hasattr(batch, "real_tokens"):
        return batch.real_tokens
    mask = getattr(batch, "attention_mask", None)
    return int(np.size(jax.tree.leaves(batch)[0]) if mask is None else np.asarray(mask).sum())
