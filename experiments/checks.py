"""What a run needs, looked at before any number is computed and any file is written.

`check` opens all of it (the model's headers, every row of the dataset, the questions) and refuses
what is wrong in a sentence; what it found on the way is given to `run.execute`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from experiments.config import DevicesConfig, RunConfig
from experiments.embedded import MODELS
from experiments.examination import check_questions
from experiments.room import check_lengths, row_lengths, workload
from experiments.rouge import Exercise, exercise_of
from experiments.rows import context_length, examples_of, find_model, model_config
from qlora_jax.checkpoints import WeightFolder
from qlora_jax.data import Examples, Pairs, load_tokenizer
from qlora_jax.evaluate import answer_tokens
from qlora_jax.models import FAMILIES, EncoderDecoderConfig, check_remat, module_names, t5_lora
from qlora_jax.plan import find_config
from qlora_jax.plan.workload import model_shapes
from qlora_jax.processes import are_several

AXIS = "data"
"""The mesh's one axis, over which the rows of a batch are cut, and the weights where they are."""


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
    return jax.make_mesh((devices.count,), (AXIS,), auto, devices=there[: devices.count])


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
