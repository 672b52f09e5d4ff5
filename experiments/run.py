"""One run, from a `RunConfig` to a run folder: what `finetune` does once and `sweep` per cell.

    config.yaml      the run, resolved; `python -m experiments.finetune --config` takes it back
    metrics.jsonl    every step and evaluation             (qlora_jax.train)
    mmlu.jsonl       the answers of the finished model     (with `mmlu` configured)
    answers.jsonl    those to the held-out rows' prompts   (with `rouge` configured)
    checkpoints/     what a killed run resumes from        (qlora_jax.train)
    adapter/         the trained adapter in PEFT's format
    result.json      held-out loss before and after, speed, memory; written last, when all is done
    error.txt        instead, where it failed

Two phases. `check` opens everything that the run needs (the model's headers, every row of the
dataset) and refuses what is wrong, before any number is computed and any file is written; `execute`
then trains. Tokenized datasets are kept between runs of one process: a sweep reads each one once.
"""

from __future__ import annotations

import itertools
import json
import platform
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

from experiments.answering import adapter_digest
from experiments.config import DevicesConfig, RunConfig, build_run
from experiments.embedded import MODELS
from experiments.examination import check_questions, final, probes
from experiments.report import ERROR, METRICS, RESULT, read_metrics
from experiments.room import check_lengths, check_room, row_lengths, workload
from experiments.rouge import Exercise, exercise_of, score
from experiments.rows import context_length, examples_of, find_model, model_config, told_of_cuts
from experiments.tree import differences, option_names, read_yaml, to_tree, to_yaml
from qlora_jax.checkpoints import WeightFolder, save_adapter
from qlora_jax.data import (
    Batches,
    Examples,
    PackedBatches,
    Pairs,
    Seq2SeqBatches,
    load_tokenizer,
)
from qlora_jax.evaluate import answer_tokens, loss_for
from qlora_jax.files import write_whole
from qlora_jax.models import FAMILIES, EncoderDecoderConfig, check_remat, module_names, t5_lora
from qlora_jax.nn import FrozenParam
from qlora_jax.plan import find_config
from qlora_jax.plan.workload import model_shapes
from qlora_jax.pretrained import load_pretrained
from qlora_jax.processes import are_several, on_first
from qlora_jax.train import Callback, fit
from qlora_jax.train.callbacks import elapsed_seconds
from qlora_jax.train.config import FREE_ON_RESUME
from qlora_jax.train.peak import (
    device_peak_since,
    forget_peak_host_bytes,
    peak_device_bytes,
    peak_host_bytes,
)

CONFIG = "config.yaml"

_AXIS = "data"


@dataclass(frozen=True)
class Checked:
    """What `check` found: the model's folder, the rows, tokenized for it, and what of them the
    finished model is to answer."""

    folder: Path
    train: Examples | Pairs
    validation: Examples | Pairs
    pad_token_id: int
    exercise: Exercise | None


def check(run: RunConfig) -> Checked:
    """Everything a run reads, looked at before anything is computed.

    Raises:
        ValueError, OSError, ModuleNotFoundError: what is wrong, in a sentence.
    """
    check_remat(
        run.model.remat,
        stream_weights=run.model.stream_weights,
        update_in_backward=run.train.update_in_backward,
    )
    mesh_of(run.devices)
    if run.model.attention == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(
            f"model.attention is 'cudnn', but this machine computes on {jax.default_backend()}: "
            "leave it out for the best that is here."
        )
    half = run.model.attention == "xla" and run.model.compute_dtype == "float16"
    if half and jax.default_backend() == "cpu":
        raise ValueError(
            "model.attention is 'xla', whose product in float16 a CPU has not: leave it out for "
            "the best that is here."
        )
    folder = model_folder(run)
    longest = run.data.max_len or context_length(folder)
    train, validation, pad = examples_of(run.data, folder, longest)
    check_lengths(run.data, train, validation)
    if run.train.neftune_noise_alpha is not None and isinstance(train, Pairs):
        raise ValueError(
            f"train.neftune_noise_alpha is set, but {run.model.source} is an encoder–decoder, and "
            "that noise is a decoder's: leave it out."
        )
    if run.data.packing and isinstance(train, Pairs):
        raise ValueError(
            f"data.packing is set, but {run.model.source} is an encoder–decoder, whose pairs are "
            "not packed: leave it out."
        )
    # Adapters that name no layer of this model, and what it cannot do, are refused here.
    model_shapes(workload(run, find_config(folder), *row_lengths(run.data, train)))
    if run.mmlu is not None:
        if isinstance(train, Pairs):
            raise ValueError(
                f"mmlu is set, but {run.model.source} is an encoder–decoder, which the examination "
                "does not ask: leave mmlu out."
            )
        answer_tokens(load_tokenizer(folder))
        check_questions(run.mmlu)
    exercise = exercise_of(run, folder, longest)
    return Checked(folder, train, validation, pad, exercise)


def told_of_idle_names(run: RunConfig, folder: Path) -> str:
    """Which names of `lora` mean no module of the model, in a sentence; "" where all do."""
    config = find_config(folder)
    names = module_names(FAMILIES[config.model_type].weight_names(config))
    idle = run.lora.idle(itertools.chain.from_iterable(names.values()))
    return f"lora names what {run.model.source} does not have: {'; '.join(idle)}" if idle else ""


def mesh_of(devices: DevicesConfig) -> jax.sharding.Mesh | None:
    """The devices that a run is spread over; None for one.

    Raises:
        ValueError: there are fewer, or others that would have nothing to do.
    """
    there = jax.devices()
    if are_several() and devices.count != len(there):
        raise ValueError(
            f"devices.count is {devices.count}, but the {jax.process_count()} processes of this "
            f"run have {len(there)} ({there[0].device_kind}): set it to that."
        )
    if devices.count > len(there):
        raise ValueError(
            f"devices.count is {devices.count}, but this machine has {len(there)} "
            f"({there[0].device_kind}): set it to that or less."
        )
    if devices.count == 1:
        return None
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices.count,), (_AXIS,), auto, devices=there[: devices.count])


def model_folder(run: RunConfig) -> Path:
    """The base model's local folder; its config.json and weight headers have been read."""
    source = run.model.source
    if source in MODELS and not MODELS[source].is_dir():
        raise FileNotFoundError(
            f"the embedded model {source} is missing from {MODELS[source].parent}: make it with "
            f"python -m experiments.embedded.pretrain {source}."
        )
    folder = find_model(source, revision=run.model.revision)
    context_length(folder)
    WeightFolder(folder)
    return folder


def with_own_adapters(run: RunConfig, given: Collection[str]) -> RunConfig:
    """The run with the paper's adapters for its kind of model: a T5's are not a Llama's.

    Args:
        run: as configured.
        given: options of `lora` that the user set, which stay.

    Raises:
        ValueError, OSError: there is no such model, or its config.json is damaged.
    """
    if run.model.source in MODELS:
        return run
    folder = find_model(run.model.source, revision=run.model.revision, files=("config.json",))
    config = model_config(folder)
    if not isinstance(config, EncoderDecoderConfig):
        return run
    own = {name: getattr(t5_lora(config), name) for name in ("r", "alpha") if name not in given}
    return replace(run, lora=replace(run.lora, **own))


class _FirstWords:
    """Writes config.yaml once the folder is known to be this run's; forgets an earlier failure."""

    def __init__(self, run: RunConfig, folder: Path, console: Console) -> None:
        self.run, self.folder, self.console = run, folder, console

    def start(self, step: int) -> None:
        """The run begins, or goes on."""
        path = self.folder / CONFIG
        if step and path.is_file():
            before, now = build_run(read_yaml(path), str(path)).devices, self.run.devices
            if before != now:
                self.console.print(
                    f"begun on {_described(before)}, going on with {_described(now)}: the result "
                    "is the same to rounding, but not to the bit.",
                    highlight=False,
                )
        write_whole(path, to_yaml(self.run))
        (self.folder / ERROR).unlink(missing_ok=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing to do."""

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


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
    train = run.train
    # Read by the examination alone, which `check` refused where there is no limit.
    context = context_length(checked.folder) or 0
    dtype = jnp.dtype(run.model.compute_dtype)
    param_dtype = jnp.dtype(run.model.param_dtype) if run.model.param_dtype else dtype
    model, tokenizer = load_pretrained(
        checked.folder,
        quant=run.quant,
        lora=run.lora,
        compute_dtype=dtype,
        param_dtype=param_dtype,
        embedding_bits=run.model.embedding_bits,
        remat=run.model.remat,
        stream_weights=run.model.stream_weights,
        mlp_tile=run.model.mlp_tile,
        attention=run.model.attention,
        packed=run.data.packing,
        longest=length,
        seed=train.seed,
        mesh=mesh_of(run.devices),
        over=_AXIS if run.devices.parts > 1 else None,
    )

    def batches(examples: Examples | Pairs, **options: Any) -> Batches | Seq2SeqBatches:
        shared = {
            "batch_size": train.micro_batch_size,
            "seed": train.seed,
            "pad_token_id": checked.pad_token_id,
            **options,
        }
        if isinstance(examples, Pairs):
            return Seq2SeqBatches(examples, source_buckets=run.data.buckets, **shared)
        return Batches(examples, buckets=run.data.buckets, **shared)

    def save(where: Path, trained: Any) -> None:
        save_adapter(where, trained, run.lora, base_name=str(checked.folder))

    def training_batches() -> Batches | PackedBatches | Seq2SeqBatches:
        accumulation = train.gradient_accumulation_steps
        if not run.data.packing or isinstance(checked.train, Pairs):
            grouped = run.data.group_by_length
            return batches(checked.train, group_by_length=grouped, accumulation=accumulation)
        return PackedBatches(
            checked.train,
            batch_size=train.micro_batch_size,
            length=length,
            seed=train.seed,
            pad_token_id=checked.pad_token_id,
            accumulation=accumulation,
        )

    beside_training = time.perf_counter() - began
    fit(
        model,
        training_batches(),
        train,
        run_folder=folder,
        folder_is_locked=True,
        eval_batches=batches(checked.validation, shuffle=False),
        loss_fn=loss_for(model, loss_chunk=run.model.loss_chunk),
        identity=identity(run),
        identity_defaults=identity(RunConfig()),
        save_adapter=save,
        probes=probes(run.mmlu, tokenizer, context),
        callbacks=[_FirstWords(run, folder, console), *callbacks],
        console=console,
    )
    trained = time.perf_counter()
    adapter = {"adapter": on_first(lambda: adapter_digest(folder / "adapter"))}
    examined = final(model, tokenizer, run.mmlu, context, folder, adapter, console)
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


def identity(run: RunConfig) -> dict[str, Any]:
    """What decides a run beside its TrainConfig, for the trainer to compare on resuming: not the
    devices, which change nothing beyond rounding."""
    tree = to_tree(run)
    return {name: tree[name] for name in ("model", "data", "quant", "lora")}


def is_finished(run: RunConfig, folder: Path) -> bool:
    """Whether a run folder holds this run, finished.

    Raises:
        ValueError: it holds another run; the message says what differs.
    """
    if not (folder / CONFIG).is_file():
        return False
    try:
        saved = build_run(read_yaml(folder / CONFIG), str(folder / CONFIG))
    except ValueError as error:
        raise ValueError(
            f"{folder} holds a run that this version cannot read, of another version or damaged "
            f"({error}): choose another --out, or give --overwrite to delete it."
        ) from error
    free = {f"train.{name}" for name in FREE_ON_RESUME}
    free |= {f"devices.{name}" for name in option_names(DevicesConfig)}
    other = [text for text in differences(run, saved) if text.split(":")[0] not in free]
    if other:
        raise ValueError(
            f"{folder} holds a run with other options ({'; '.join(other)}): choose another --out, "
            "set them back, or give --overwrite to delete it."
        )
    return (folder / RESULT).is_file()


def _described(devices: DevicesConfig) -> str:
    return "1 device" if devices.count == 1 else f"{devices.count} devices ({devices.weights})"


def _result(model: nnx.Module, folder: Path, labels: Mapping[str, str]) -> dict[str, Any]:
    """From the metrics on disk, so that a run in several pieces tells the same as one in one."""
    metrics = read_metrics(folder / METRICS)
    evaluations = [line for line in metrics if "eval_loss" in line]
    steps = [line for line in metrics if "loss" in line]
    speeds = [line["tokens_per_second"] for line in steps if "tokens_per_second" in line]
    lora, frozen = nnx.state(model, nnx.LoRAParam), nnx.state(model, FrozenParam)

    def evaluation(line: Mapping[str, Any]) -> dict[str, Any]:
        return {name: line[f"eval_{name}"] for name in ("loss", "perplexity", "tokens")}

    return {
        "labels": dict(labels),
        "before": evaluation(evaluations[0]),
        "after": evaluation(evaluations[-1]),
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
