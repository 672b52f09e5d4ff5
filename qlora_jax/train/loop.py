"""How does a run go? `fit`: resume, step, look, save, until the last step.

The loop keeps the device busy: step n + 1 is dispatched before the metrics of step n are read, and
its batch is collated meanwhile. So a loss that is not finite is noticed one step late; but what is
saved was looked at first, and the checkpoints of a run that blew up are all from before.

A run is a pure function of (model, data, configuration): batches come from `batches.at(step)`,
random keys from (seed, step). Killed at any moment and called again with the same arguments, it
goes on from its latest checkpoint and ends with the same bits.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, PyTree
from rich.console import Console

from qlora_jax.evaluate import (
    Evaluation,
    LossFn,
    causal_lm_loss,
    evaluate,
    make_eval_step,
    split_adapters,
)
from qlora_jax.models import check_remat, spread_rows, streaming
from qlora_jax.models.neftune import set_noise
from qlora_jax.processes import are_several, is_first, on_first
from qlora_jax.train.callbacks import Callback, MetricsFile, Probe, TensorBoard
from qlora_jax.train.checkpoint import Checkpoints
from qlora_jax.train.clock import Clock
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.peak import peak_device_bytes, peak_host_bytes
from qlora_jax.train.progress import ProgressDisplay
from qlora_jax.train.run_folder import (
    ADAPTER,
    ADAPTERS,
    check_or_write_config,
    describe_run,
    forget_adapters,
    locked_run_folder,
)
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
    tokens_per_second: float | None
    peak_host_bytes: int
    peak_device_bytes: int | None
    host_traffic: HostTraffic | None


def fit(
    model: nnx.Module,
    batches: StepBatches,
    config: TrainConfig,
    *,
    run_folder: str | Path,
    folder_is_locked: bool = False,
    eval_batches: EpochBatches | Sequence[Any] | None = None,
    loss_fn: LossFn = causal_lm_loss,
    tx: optax.GradientTransformation | None = None,
    identity: Mapping[str, Any] | None = None,
    identity_defaults: Mapping[str, Any] | None = None,
    identity_free: Collection[str] = (),
    save_adapter: Callable[[Path, nnx.Module], None] | None = None,
    probes: Sequence[Probe] = (),
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
) -> FitResult:
    """Train the adapters (`nnx.LoRAParam`) of a model in place.

    Of several processes (`qlora_jax.processes`) all call it, with the same arguments; the run
    folder, the callbacks and the console are the first one's.

    Args:
      model: any NNX module with LoRA parameters; its adapters are trained, and updated even where
        the run is broken off. Where it is spread over devices (`models.spread`), each of them gets
        its rows of every micro-batch that divides evenly.
      batches: `batches.at(step)` for steps from 0; where it has `steps_per_epoch`, a new run says
        how many epochs it takes.
      config: hyperparameters.
      run_folder: belongs to this run; where it holds checkpoints of the same run, that is resumed.
      folder_is_locked: the caller holds it (`run_folder.locked_run_folder`); else it is held here,
        while this call lasts.
      eval_batches: held-out data, looked at before the first step, every `config.eval_every`
        steps, and after the last.
      loss_fn: (model, batch, dropout key) -> (sum of token losses, token count).
      tx: the optimizer instead of `config.optimizer()`; name it in `identity`. What is logged as
        `learning_rate` is `config`'s all the same.
      identity: what else decides the run (model, data, adapters …), by name; kept in config.json
        and compared on resuming.
      identity_defaults: what a run did that was begun before `identity` had a name, by name; None
        for those that are not here.
      identity_free: dotted names in `identity` that may differ on resuming.
      save_adapter: called at the end with `run_folder/adapter` and the model, and beside each
        checkpoint before with `run_folder/adapters/STEP`, for instance
        `lambda folder, model: ql.save_adapter(folder, model, lora_config, base_name)`.
      probes: further examinations of the model, such as MMLU's.
      callbacks: see `train.callbacks`, beside metrics.jsonl, the progress display, and TensorBoard
        files where tensorboardX is installed.
      console: where progress is shown; default: standard output.

    Returns:
      How the run ended.

    Raises:
      ValueError: the folder holds a run with another configuration; the model has no adapters; a
        batch does not have the configured shape.
      RuntimeError: another process is writing the folder.
      FloatingPointError: loss or gradients became NaN or infinite, naming the step.
    """
    folder = Path(run_folder)
    with contextlib.ExitStack() as stack:
        if not folder_is_locked:
            on_first(lambda: stack.enter_context(locked_run_folder(folder)))
        checkpoints = stack.enter_context(
            Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints)
        )
        started = checkpoints.latest_step() is not None
        described = describe_run(config, identity or {})
        on_first(
            lambda: check_or_write_config(
                folder,
                described,
                started=started,
                defaults=identity_defaults,
                free=identity_free,
                # An optimizer of the caller's may have a schedule of its own.
                may_go_further=tx is None,
            )
        )
        console = (console or Console()) if is_first() else Console(quiet=True)
        display = ProgressDisplay(config.steps, console=console, log_every=config.log_every)
        outlets: list[Callback] = []
        if is_first():
            outlets += [MetricsFile(folder / "metrics.jsonl"), display, *callbacks]
        if is_first() and TensorBoard.available():
            outlets.append(TensorBoard(folder / "tensorboard"))
        for outlet in outlets:
            stack.callback(outlet.close)
        tx = tx or config.optimizer()

        def keep_adapter(lora: Any, step: int | None = None) -> None:
            if save_adapter is None:
                return
            nnx.update(model, lora)
            save_adapter(folder / (ADAPTER if step is None else f"{ADAPTERS}/{step}"), model)
            if step is not None:
                on_first(lambda: forget_adapters(folder, keep=config.keep_checkpoints))

        run = _Run(
            model, config, loss_fn, tx, checkpoints, outlets, probes, display.say, keep_adapter
        )
        # The step uses up the model's own arrays, so it is given the trained ones however it ends.
        stack.callback(lambda: nnx.update(model, run.state.lora))
        result = run.train(batches, eval_batches)
        keep_adapter(run.state.lora)
    console.print(_summary(result), highlight=False, markup=False, soft_wrap=True)
    return result


class _Run:
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
        keep_adapter: Callable[[Any, int], None],
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
        self.graphdef, self.probes, self.say = graphdef, probes, say
        self.keep_adapter = keep_adapter
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
            for step in range(first + 1, config.steps + 1):
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
        if eval_batches is not None and first >= config.steps:
            # Already on record: a finished run's files do not change.
            evaluations.append(self.held_out(eval_batches))
        return FitResult(
            step=int(self.state.step),
            train_loss=self.train_loss,
            first_eval=evaluations[0] if evaluations and not self.resumed else None,
            last_eval=evaluations[-1] if evaluations else None,
            tokens_per_second=self.clock.tokens_per_second,
            peak_host_bytes=peak_host_bytes(),
            peak_device_bytes=peak_device_bytes(),
            host_traffic=self.traffic,
        )

    def dispatch(self, step: int, batch: Any) -> None:
        """Start one step, then read the metrics of the one before."""
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
        """Held-out loss of the state after `step`, logged."""
        self.report()
        found = self.held_out(batches)
        self.log(step, {f"eval_{name}": value for name, value in found._asdict().items()})
        self.clock.pause()
        return found

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
        if step < self.config.steps:  # the caller keeps the last
            self.keep_adapter(self.state.lora, step)
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
        return step == self.config.steps or (every > 0 and step % every == 0)

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
        return f"{kept}; try a lower learning_rate or a warmup in a new run folder."


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


def _real_tokens(batch: Any) -> int:
    """Tokens of a batch without its padding: its own `real_tokens`, or those of its attention_mask;
    all elements where it has neither."""
    if hasattr(batch, "real_tokens"):
        return batch.real_tokens
    mask = getattr(batch, "attention_mask", None)
    return int(np.size(jax.tree.leaves(batch)[0]) if mask is None else np.asarray(mask).sum())


def _summary(result: FitResult) -> str:
    parts = [f"{result.step} steps"]
    if result.first_eval is not None and result.last_eval is not None:
        parts.append(f"held-out loss {result.first_eval.loss:.4f} → {result.last_eval.loss:.4f}")
    elif result.last_eval is not None:
        parts.append(f"held-out loss {result.last_eval.loss:.4f}")
    if result.tokens_per_second is not None:
        parts.append(f"{result.tokens_per_second:,.0f} tokens/s")
    parts.append(f"peak host memory {result.peak_host_bytes / 2**30:.2f} GiB")
    if result.peak_device_bytes is not None:
        parts.append(f"peak device memory {result.peak_device_bytes / 2**30:.2f} GiB")
    if result.host_traffic is not None and result.host_traffic.total:
        parts.append(f"host traffic a step {result.host_traffic.total / 2**30:.2f} GiB")
    return ", ".join(parts)
