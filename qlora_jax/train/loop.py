"""How does a run go? `fit`: resume, step, look, save, until the last step (`run.py`).

A run is a pure function of (model, data, configuration): batches come from `batches.at(step)`,
random keys from (seed, step). Killed at any moment and called again with the same arguments, it
goes on from its latest checkpoint and ends with the same bits. Interrupted (KeyboardInterrupt), it
first keeps the step that it is at, where it can (`Run.keep`).
"""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import optax
from flax import nnx
from rich.console import Console

from qlora_jax.data import Examples, Pairs
from qlora_jax.evaluate import LossFn, causal_lm_loss
from qlora_jax.processes import is_first, on_first
from qlora_jax.train.best import Best
from qlora_jax.train.callbacks import Callback, MetricsFile, Probe, TensorBoard, read_lines
from qlora_jax.train.checkpoint import Checkpoints
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.fingerprint import fingerprint
from qlora_jax.train.progress import ProgressDisplay
from qlora_jax.train.run import EpochBatches, FitResult, Run, StepBatches
from qlora_jax.train.run_folder import (
    ADAPTER,
    ADAPTERS,
    METRICS,
    check_or_write_config,
    describe_run,
    forget_adapters,
    locked_run_folder,
)


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
        steps, and after the last; by it `config.patience` ends the run.
      loss_fn: (model, batch, dropout key) -> (sum of token losses, token count).
      tx: the optimizer instead of `config.optimizer()`; name it in `identity`. What is logged as
        `learning_rate` is `config`'s all the same.
      identity: what else decides the run (base model, data, adapters …), by name; kept in
        config.json and compared on resuming, beside `config` and what is read off the model and the
        first batch (`fingerprint.py`).
      identity_defaults: what a run did that was begun before `identity` had a name, by name; None
        for those that are not here.
      identity_free: dotted names in `identity` that may differ on resuming; "adapters",
        "quantized", "first_batch" of what is read.
      save_adapter: called at the end with `run_folder/adapter` and the model, beside each
        checkpoint before with `run_folder/adapters/STEP`, and with `run_folder/best` where
        `config.keep_best` asks for it, for instance
        `lambda folder, model: ql.save_adapter(folder, model, lora_config, base_name)`.
      probes: further examinations of the model, such as MMLU's.
      callbacks: see `train.callbacks`, beside metrics.jsonl, the progress display, and TensorBoard
        files where tensorboardX is installed.
      console: where progress is shown; default: standard output.

    Returns:
      How the run ended.

    Raises:
      ValueError: the folder holds a run with another configuration; the model has no adapters; a
        batch does not have the configured shape; what goes by evaluations has none.
      TypeError: an argument is of another kind than these.
      RuntimeError: another process is writing the folder.
      FloatingPointError: loss or gradients became NaN or infinite, naming the step.
    """
    _check_kinds(batches, config, eval_batches, probes, callbacks)
    _check_evaluations(config, eval_batches, save_adapter)
    folder = Path(run_folder)
    with contextlib.ExitStack() as stack:
        if not folder_is_locked:
            on_first(lambda: stack.enter_context(locked_run_folder(folder)))
        checkpoints = stack.enter_context(
            Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints)
        )
        resumed = checkpoints.latest_step()
        described = describe_run(config, identity or {}, fingerprint(model, batches))
        on_first(
            lambda: check_or_write_config(
                folder,
                described,
                started=resumed is not None,
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
            outlets += [MetricsFile(folder / METRICS), display, *callbacks]
        if is_first() and TensorBoard.available():
            outlets.append(TensorBoard(folder / "tensorboard"))
        for outlet in outlets:
            stack.callback(outlet.close)
        tx = tx or config.optimizer()

        def keep_adapter(lora: Any, where: str = ADAPTER) -> None:
            if save_adapter is None:
                return
            nnx.update(model, lora)
            save_adapter(folder / where, model)
            if where.startswith(ADAPTERS):
                on_first(lambda: forget_adapters(folder, keep=config.keep_checkpoints))

        known = on_first(lambda: read_lines(folder / METRICS)) if resumed else []
        run = Run(
            model,
            config,
            loss_fn,
            tx,
            checkpoints,
            outlets,
            probes,
            display.say,
            keep_adapter,
            Best.of(known, upto=resumed or 0),
        )
        # The step uses up the model's own arrays, so it is given the trained ones however it ends.
        stack.callback(lambda: nnx.update(model, run.state.lora))
        result = run.train(batches, eval_batches)
        keep_adapter(run.state.lora)
    console.print(_summary(result), highlight=False, markup=False, soft_wrap=True)
    return result


def _check_kinds(
    batches: Any, config: Any, eval_batches: Any, probes: Sequence[Any], callbacks: Sequence[Any]
) -> None:
    """Refuses what would be found out in the midst of the run."""
    of_batches = isinstance(eval_batches, EpochBatches | Sequence | None)
    # A sequence, too, but not of batches.
    of_rows = isinstance(eval_batches, Examples | Pairs)
    for name, given, fits, needs in (
        ("batches", batches, isinstance(batches, StepBatches), "Batches, or what has .at(step)"),
        ("config", config, isinstance(config, TrainConfig), "a TrainConfig"),
        ("eval_batches", eval_batches, of_batches and not of_rows, "Batches, or a list of batches"),
        *(("probes", each, isinstance(each, Probe), "Probes") for each in probes),
        *(("callbacks", each, isinstance(each, Callback), "Callbacks") for each in callbacks),
    ):
        if not fits:
            raise TypeError(f"{name} is given a {type(given).__name__}, but needs {needs}.")


def _check_evaluations(config: TrainConfig, eval_batches: Any, save_adapter: Any) -> None:
    """Refuses what goes by evaluations where there are none, or nothing to keep by them."""
    for name, given in (("patience", config.patience), ("keep_best", config.keep_best)):
        if given and eval_batches is None:
            raise ValueError(f"{name}={given} goes by held-out loss: give eval_batches.")
    if config.keep_best and save_adapter is None:
        raise ValueError("keep_best=True keeps an adapter: give save_adapter, which writes it.")


def _summary(result: FitResult) -> str:
    parts = [f"{result.step} steps"]
    if result.first_eval is not None and result.last_eval is not None:
        parts.append(f"held-out loss {result.first_eval.loss:.4f} → {result.last_eval.loss:.4f}")
    elif result.last_eval is not None:
        parts.append(f"held-out loss {result.last_eval.loss:.4f}")
    if result.best is not None and result.best.since:
        parts.append(f"lowest {result.best.loss:.4f} at step {result.best.step}")
    if result.tokens_per_second is not None:
        parts.append(f"{result.tokens_per_second:,.0f} tokens/s")
    parts.append(f"peak host memory {result.peak_host_bytes / 2**30:.2f} GiB")
    if result.peak_device_bytes is not None:
        parts.append(f"peak device memory {result.peak_device_bytes / 2**30:.2f} GiB")
    if result.host_traffic is not None and result.host_traffic.total:
        parts.append(f"host traffic a step {result.host_traffic.total / 2**30:.2f} GiB")
    return ", ".join(parts)
