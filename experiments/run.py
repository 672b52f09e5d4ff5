"""One run, from a `RunConfig` to a run folder: what `finetune` does once and `sweep` per cell.

    config.yaml      the run, resolved; `python -m experiments.finetune --config` takes it back
    metrics.jsonl    every step and evaluation             (qlora_jax.train)
    checkpoints/     what a killed run resumes from        (qlora_jax.train)
    adapters/        the adapter as of each checkpoint     (likewise)
    best/            with `train.keep_best`, the one of the lowest held-out loss
    mmlu.jsonl       the finished model's answers          (with `mmlu` configured)
    answers.jsonl    those to the held-out rows' prompts   (with `rouge` configured)
    adapter/         the trained adapter in PEFT's format
    result.json      held-out loss before and after, speed, memory; written last, when all is done
    error.txt        instead, where it failed

`checks.check` comes first, and refuses what is wrong before any file is written. Tokenized datasets
are kept between runs of one process: a sweep reads each one once.
"""

from __future__ import annotations

import functools
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

from experiments.answering import PARTIAL, adapter_digest
from experiments.checks import AXIS, Checked, check, mesh_of, told_of_idle_names
from experiments.config import DevicesConfig, RunConfig, build_run
from experiments.examination import ANSWERS as MMLU
from experiments.examination import final, probes
from experiments.report import ERROR, METRICS, RESULT, read_metrics
from experiments.room import check_room, row_lengths
from experiments.rouge import score
from experiments.rows import context_length, told_of_cuts
from experiments.tree import differences, option_names, read_yaml, to_tree, to_yaml
from qlora_jax.checkpoints import load_adapter, save_adapter
from qlora_jax.data import Batches, Examples, PackedBatches, Pairs, Seq2SeqBatches, Tokenizer
from qlora_jax.evaluate import loss_for
from qlora_jax.files import write_whole
from qlora_jax.nn import FrozenParam
from qlora_jax.pretrained import load_pretrained
from qlora_jax.processes import on_first
from qlora_jax.train import Callback, fit
from qlora_jax.train.callbacks import elapsed_seconds
from qlora_jax.train.config import FREE_ON_RESUME, goes_further
from qlora_jax.train.peak import (
    device_peak_since,
    forget_peak_host_bytes,
    peak_device_bytes,
    peak_host_bytes,
)
from qlora_jax.train.run_folder import ADAPTER, BEST

CONFIG = "config.yaml"


class _FirstWords(Callback):
    """Writes config.yaml once the folder is known to be this run's; forgets an earlier failure, and
    what a finished run was found to be that is given more steps."""

    def __init__(self, run: RunConfig, folder: Path, console: Console) -> None:
        self.run, self.folder, self.console = run, folder, console

    def start(self, step: int) -> None:
        """The run begins, or goes on."""
        path = self.folder / CONFIG
        if step and path.is_file():
            before, now = build_run(read_yaml(path), str(path)), self.run
            rounded = {*_rounded(now), "train.update_in_backward"}
            changed = [text for text in differences(now, before) if text.split(":")[0] in rounded]
            told = [f"going on with {', '.join(changed)}"] if changed else []
            if before.devices != now.devices:
                devices = _described(before.devices), _described(now.devices)
                told.append("begun on {}, going on with {}".format(*devices))
            for text in told:
                self.console.print(
                    f"{text}: the result is the same to rounding, but not to the bit.",
                    highlight=False,
                    markup=False,
                )
        # What a model with fewer steps was found to be; first the result, which says "finished".
        examined = (RESULT, MMLU, PARTIAL) if step < self.run.train.steps else ()
        for name in (*examined, ERROR):
            (self.folder / name).unlink(missing_ok=True)
        write_whole(path, to_yaml(self.run))


def execute(
    run: RunConfig,
    folder: Path,
    *,
    labels: Mapping[str, str],
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Train, or go on training, in a run folder; returns (and writes) the content of result.json.

    The caller holds the folder (`locked_run_folder`) from before the model is loaded until its
    result is written, so that of several processes one does all of it.

    Raises:
        ValueError, OSError, RuntimeError: as `check` and `qlora_jax.train.fit` do.
    """
    began = time.perf_counter()
    # Of a sweep's cells each is told what it held itself.
    forget_peak_host_bytes()
    device_peak_before = peak_device_bytes()
    console = console or Console()
    checked = check(run)
    cuts = told_of_cuts(run.data, checked.train)
    idle = told_of_idle_names(run, checked.folder)
    for told in filter(None, (cuts, idle)):
        console.print(told, highlight=False, markup=False, soft_wrap=True)
    length, target = row_lengths(run.data, checked.train)
    check_room(run, checked.folder, length, target)
    # Read by the examination alone, which `check` refused where there is no limit.
    context = context_length(checked.folder) or 0
    model, tokenizer = _load(run, checked.folder, length)

    def save(where: Path, trained: Any) -> None:
        save_adapter(where, trained, run.lora, base_name=str(checked.folder))

    rows = {"training": checked.train.digest(), "held_out": checked.validation.digest()}
    beside_training = time.perf_counter() - began
    fit(
        model,
        _training_batches(run, checked, length),
        run.train,
        run_folder=folder,
        folder_is_locked=True,
        eval_batches=_batches(run, checked, checked.validation, shuffle=False),
        loss_fn=loss_for(model, loss_chunk=run.model.loss_chunk),
        identity=identity(run) | {"rows": rows},
        identity_free=_rounded(run),
        # A run that was begun before its rows were kept in mind is taken to have had these.
        identity_defaults=identity(RunConfig()) | {"rows": rows},
        save_adapter=save,
        probes=probes(run.mmlu, tokenizer, context),
        callbacks=[_FirstWords(run, folder, console), *callbacks],
        console=console,
    )
    trained = time.perf_counter()
    examined: dict[str, Any] = {}
    if run.mmlu is not None or checked.exercise is not None:
        adapter = {"adapter": _load_examined(model, folder, run.train.keep_best)}
        examined |= final(model, tokenizer, run.mmlu, context, folder, adapter, console)
        examined |= score(model, tokenizer, checked.exercise, folder, adapter, console)
    beside_training += time.perf_counter() - trained

    def conclude() -> dict[str, Any]:
        result = _result(model, folder, labels) | {
            **examined,
            "peak_device_memory_bytes": device_peak_since(device_peak_before),
            "seconds": round(beside_training + elapsed_seconds(read_metrics(folder / METRICS)), 1),
            "devices": run.devices.count,
            "train_rows": len(checked.train),
            "validation_rows": len(checked.validation),
        }
        write_whole(folder / RESULT, json.dumps(result, indent=1) + "\n")
        return result

    return on_first(conclude)


def _load_examined(model: nnx.Module, folder: Path, keep_best: bool) -> str:
    """Puts into a trained model the adapter that is examined: the best that was kept, or the last,
    which it has. Returns that adapter's digest."""
    # None is the best where every held-out loss was infinite.
    best = keep_best and on_first((folder / BEST).is_dir)
    digest: str = on_first(lambda: adapter_digest(folder / (BEST if best else ADAPTER)))
    if best:
        load_adapter(folder / BEST, model)
    return digest


def _load(run: RunConfig, folder: Path, length: int) -> tuple[Any, Tokenizer]:
    """The base model with fresh adapters, and its tokenizer."""
    dtype = jnp.dtype(run.model.compute_dtype)
    return load_pretrained(
        folder,
        quant=run.quant,
        lora=run.lora,
        compute_dtype=dtype,
        param_dtype=jnp.dtype(run.model.param_dtype) if run.model.param_dtype else dtype,
        embedding_bits=run.model.embedding_bits,
        remat=run.model.remat,
        stream_weights=run.model.stream_weights,
        mlp_tile=run.model.mlp_tile,
        attention=run.model.attention,
        packed=run.data.packing,
        longest=length,
        seed=run.train.seed,
        mesh=mesh_of(run.devices),
        over=AXIS if run.devices.parts > 1 else None,
    )


def _training_batches(
    run: RunConfig, checked: Checked, length: int
) -> Batches | PackedBatches | Seq2SeqBatches:
    accumulation = run.train.gradient_accumulation_steps
    if not run.data.packing or isinstance(checked.train, Pairs):
        grouped = run.data.group_by_length
        return _batches(
            run, checked, checked.train, group_by_length=grouped, accumulation=accumulation
        )
    return PackedBatches(
        checked.train,
        batch_size=run.train.micro_batch_size,
        length=length,
        seed=run.train.seed,
        pad_token_id=checked.pad_token_id,
        accumulation=accumulation,
    )


def _batches(
    run: RunConfig, checked: Checked, examples: Examples | Pairs, **options: Any
) -> Batches | Seq2SeqBatches:
    shared = {
        "batch_size": run.train.micro_batch_size,
        "seed": run.train.seed,
        "pad_token_id": checked.pad_token_id,
        **options,
    }
    if isinstance(examples, Pairs):
        return Seq2SeqBatches(examples, source_buckets=run.data.buckets, **shared)
    return Batches(examples, buckets=run.data.buckets, **shared)


def identity(run: RunConfig) -> dict[str, Any]:
    """What decides a run beside its TrainConfig, for the trainer to compare on resuming: not the
    devices, which change nothing beyond rounding."""
    tree = to_tree(run)
    return {name: tree[name] for name in ("model", "data", "quant", "lora")}


def _rounded(run: RunConfig) -> set[str]:
    """Options of the model by which it takes more memory or less, and which change nothing beyond
    rounding: free to differ on resuming."""
    # In tiles, an MLP's adapters drop other units.
    tile = () if run.lora.lora_dropout else ("mlp_tile",)
    return {f"model.{n}" for n in ("remat", "stream_weights", "attention", "loss_chunk", *tile)}


@functools.cache
def _today() -> str:
    """The day on which this process began to ask for it: the same for all cells of a sweep."""
    return date.today().isoformat()


def dated(run: RunConfig, folder: Path) -> RunConfig:
    """The run with the date that its chat template writes: the one given, or the one that the run
    in the folder was begun with, or today's.

    Raises:
        ValueError: what the folder holds cannot be read.
    """
    if run.data.format != "chat-template" or run.data.date is not None:
        return run
    day = on_first(lambda: _day_begun(folder))
    return replace(run, data=replace(run.data, date=day))


def _day_begun(folder: Path) -> str | None:
    """None for a run of an older version, whose template writes the day of the call."""
    saved = _saved(folder)
    return _today() if saved is None else saved.data.date


def _saved(folder: Path) -> RunConfig | None:
    """The run that a folder holds, if any."""
    if not (folder / CONFIG).is_file():
        return None
    try:
        return build_run(read_yaml(folder / CONFIG), str(folder / CONFIG))
    except ValueError as error:
        raise ValueError(
            f"{folder} holds a run that this version cannot read, of another version or damaged "
            f"({error}): choose another --out, or give --overwrite to delete it."
        ) from error


def is_finished(run: RunConfig, folder: Path) -> bool:
    """Whether a run folder holds this run (`dated`), finished; one that has fewer steps is not, nor
    one that ended early by another `patience`.

    Raises:
        ValueError: it holds another run; the message says what differs.
    """
    saved = _saved(folder)
    if saved is None:
        return False
    free = {f"train.{name}" for name in FREE_ON_RESUME}
    free |= _rounded(run) | {f"devices.{name}" for name in option_names(DevicesConfig)}
    further = goes_further(asdict(saved.train), asdict(run.train))
    if further:
        free.add("train.steps")
    other = [text for text in differences(run, saved) if text.split(":")[0] not in free]
    if other:
        raise ValueError(
            f"{folder} holds a run with other options ({'; '.join(other)}): choose another --out, "
            "set them back, or give --overwrite to delete it."
        )
    if further or not (folder / RESULT).is_file():
        return False
    # One that was out of patience may have more now.
    ended = json.loads((folder / RESULT).read_text())["steps"]
    return ended >= run.train.steps or run.train.patience == saved.train.patience


def _described(devices: DevicesConfig) -> str:
    return "1 device" if devices.count == 1 else f"{devices.count} devices ({devices.weights})"


def _result(model: nnx.Module, folder: Path, labels: Mapping[str, str]) -> dict[str, Any]:
    """From the metrics on disk, so that a run in several pieces tells the same as one in one."""
    metrics = read_metrics(folder / METRICS)
    evaluations = [line for line in metrics if "eval_loss" in line]
    # The first is the base's.
    best = min(evaluations[1:], key=lambda line: line["eval_loss"])
    steps = [line for line in metrics if "loss" in line]
    speeds = [line["tokens_per_second"] for line in steps if "tokens_per_second" in line]
    lora, frozen = nnx.state(model, nnx.LoRAParam), nnx.state(model, FrozenParam)

    def evaluation(line: Mapping[str, Any]) -> dict[str, Any]:
        return {name: line[f"eval_{name}"] for name in ("loss", "perplexity", "tokens")}

    return {
        "labels": dict(labels),
        "before": evaluation(evaluations[0]),
        "after": evaluation(evaluations[-1]),
        "best": {"step": best["step"], **evaluation(best)},
        "steps": steps[-1]["step"],
        "trained_tokens": sum(line["tokens"] for line in steps),
        "tokens_per_second": speeds[-1] if speeds else 0.0,
        "peak_host_memory_bytes": peak_host_bytes(),
        "adapter_parameters": sum(leaf.size for leaf in jax.tree.leaves(lora)),
        "base_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(frozen)),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
