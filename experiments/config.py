"""What a run is, as frozen dataclasses, and how a tree of options becomes one.

A run's configuration has the sections `model`, `data`, `quant`, `lora`, `train`, `devices`, `mmlu`
and `rouge`. Three of them are the library's own dataclasses. A file names only what differs from
the defaults; the resolved tree is written beside a run's results and can be given back as a file.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from experiments.embedded import DATASETS, MODELS
from experiments.tree import Tree, convert
from qlora_jax.data import INSTRUCT
from qlora_jax.data.segments import TrainOn
from qlora_jax.models import LOSS_CHUNK
from qlora_jax.nn import LoraConfig
from qlora_jax.quant import QuantConfig
from qlora_jax.train import TrainConfig


@dataclass(frozen=True)
class ModelConfig:
    """Which base model, and in which precision it computes.

    Attributes:
        source: an embedded model's name, a Hugging Face folder, or a hub name ("owner/name").
        revision: of a hub name.
        compute_dtype: of activations and matmuls.
        param_dtype: of the frozen weights that are not quantized: embeddings, head, and with
            `quant: null` all; None for `compute_dtype`.
        embedding_bits: 8 or 4 keeps embedding and head packed, for a small loss of accuracy; None
            keeps them in `param_dtype`.
        remat: what the backward pass recomputes: "full" (least memory on the card but "offload",
            which keeps layers' inputs on the host), "attention", "dots" or "none" (fastest).
        stream_weights: the layers' frozen weights rest in host memory and come in layer by layer.
        mlp_tile: tokens that an MLP reads at once (4096 is usual for long sequences); None for all.
        attention: "xla", "cudnn" or "chunked"; None for the best that the card and model allow.
        loss_chunk: tokens whose logits are held at once; None holds all.
    """

    source: str = "stdlib-1m"
    revision: str | None = None
    compute_dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    param_dtype: Literal["bfloat16", "float32", "float16"] | None = None
    embedding_bits: Literal[8, 4] | None = None
    remat: Literal["full", "offload", "attention", "dots", "none"] = "full"
    stream_weights: bool = False
    mlp_tile: int | None = None
    attention: Literal["xla", "cudnn", "chunked"] | None = None
    loss_chunk: int | None = LOSS_CHUNK

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("source is empty: give a name, a folder or a hub name.")
        for name in ("mlp_tile", "loss_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 token or more; null for all at once.")


@dataclass(frozen=True)
class DataConfig:
    """Which rows, in which prompt, cut where.

    Attributes:
        source: an embedded dataset's name, one of the paper's eight (`qlora_jax.data.INSTRUCT`), a
            file (.json, .jsonl, .csv, .parquet, .arrow), a folder, or a hub name.
        name: the configuration of a hub dataset or folder that has several.
        files: of a dataset of the paper, the file or folder that holds it; None: the hub.
        hub_files: of one on the hub, read only these of its files (patterns): FLAN v2's
            submixtures.
        split: the rows to train on; None for the only split or "train".
        validation_source: another source for the validation rows, in the format of the training
            rows: as `source`, but no dataset of the paper; None for the same.
        validation_split: the split that holds them; None without a `validation_source` holds
            `validation_rows` of the training rows out instead (the same ones for every seed).
            An embedded dataset has its own.
        validation_rows: how many rows are held out, or, of a split, the most that are used.
        max_rows: train on the first so many rows only.
        columns: by the name that the format knows, what the dataset calls a column
            (`messages: conversations`, `output: answer`).
        format: a prompt format of `qlora_jax.data.FORMATS`; "chat-template", the model's own;
            "auto" looks at the columns. A dataset of the paper brings its own.
        system_prompt: for conversations (`messages`) that have none.
        date: what a chat template may write for today (2026-11-30), as Llama 3's does; None: the
            day on which the run begins, which its config.yaml then names.
        train_on: loss on the "response" only, of a conversation only on what answers its "last"
            question, or on "all"; None: as the paper did for its dataset, else on the response.
        source_max_len, target_max_len: tokens that prompt and response are cut to; null for no
            limit. A conversation or plain text is all response: "auto" cuts it to 512, or to the
            model's context, and the response to an instruction to 128.
        max_len: refuse longer examples; None: the model's own limit, beyond which rotary positions
            go on, untrained.
        group_by_length: batches of examples of like length.
        buckets: lengths that batches are padded to, each one a program to compile; None: powers of
            two from 64 up to the longest row.
        packing: put several training examples into each row, apart in attention; then
            `train.micro_batch_size` counts rows, and `group_by_length` and `buckets` mean nothing.
        packed_length: tokens of a packed row; None: the longest example, rounded up to 64.
    """

    source: str = "describe"
    name: str | None = None
    files: str | None = None
    hub_files: tuple[str, ...] | None = None
    split: str | None = None
    validation_source: str | None = None
    validation_split: str | None = None
    validation_rows: int = 200
    max_rows: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    format: str = "auto"
    system_prompt: str | None = None
    date: str | None = None
    train_on: TrainOn | None = None
    source_max_len: int | None = 384
    target_max_len: int | Literal["auto"] | None = "auto"
    max_len: int | None = None
    group_by_length: bool = True
    buckets: tuple[int, ...] | None = None
    packing: bool = False
    packed_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("source", "name", "files", "split", "validation_source", "validation_split"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty: give a name, a path or a hub name, or null.")
        for name in (
            "validation_rows",
            "max_rows",
            "source_max_len",
            "target_max_len",
            "max_len",
            "packed_length",
        ):
            value = getattr(self, name)
            if value not in (None, "auto") and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more.")
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError as error:
                raise ValueError(f"date={self.date!r} must be a day, as 2026-11-30.") from error
        if self.buckets is not None and not (self.buckets and min(self.buckets) > 0):
            raise ValueError(f"buckets={list(self.buckets)} must be lengths of 1 token or more.")


@dataclass(frozen=True)
class DevicesConfig:
    """Over which devices a run is spread (`qlora_jax.models.spread`): this machine's, or with
    `--cluster` those of all processes.

    Results differ by rounding alone, so that a run may be resumed on other devices.

    Attributes:
        count: of devices, from the first on; each takes its rows of every micro-batch.
        weights: "whole", all of them on every device, or "cut": a part of codes, absmax, adapters
            and moments on each.
    """

    count: int = 1
    weights: Literal["whole", "cut"] = "whole"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count={self.count} must be at least 1.")

    @property
    def parts(self) -> int:
        """Into how many parts weights are cut."""
        return self.count if self.weights == "cut" else 1


@dataclass(frozen=True)
class MmluConfig:
    """How a run is examined on MMLU.

    Attributes:
        source: the hub name of a set in the form of "cais/mmlu", or a folder with the original
            `dev/`, `val/` and `test/` CSV files.
        split: which questions the finished run is asked: "test", "val" (or another folder of the
            source); None: none.
        every: steps between examinations on the validation questions during training; 0: none.
        shots: solved questions in front of each, from `dev`: 5 or 0 in the paper.
        limit: only so many questions of each subject; None: all.
        batch_size: questions at once.
    """

    source: str = "cais/mmlu"
    split: str | None = "test"
    every: int = 0
    shots: int = 5
    limit: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.split == "dev":
            raise ValueError(
                "split is 'dev', whose questions are shown with their answers in front of every "
                "question: give test or val."
            )
        for name, least in (("every", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more.")
        if not 0 <= self.shots <= 5:
            raise ValueError(
                f"shots={self.shots} must be 0 to 5: dev has five questions a subject."
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be 1 or more; null asks all questions.")


@dataclass(frozen=True)
class RougeConfig:
    """How a finished run's answers to the held-out rows are scored (`experiments.rouge`).

    Attributes:
        limit: only so many of the rows, of all lengths alike; None: all.
        max_new_tokens: tokens of an answer at most; None: those of the longest answer held out.
        batch_size: rows at once.
    """

    limit: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("limit", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more.")


@dataclass(frozen=True)
class RunConfig:
    """One run, wholly.

    Attributes:
        model: the base.
        data: the rows.
        quant: how the base is stored; None (`quant: null`) keeps it in 16 bits, which is LoRA.
        lora: the adapters.
        train: the optimizer and the loop; `train.seed` also decides the adapters' initial values
            and the batch order.
        devices: how many of them, and what each holds.
        mmlu: the examination; None: none.
        rouge: what is made of the held-out rows beside their loss; None: nothing.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    quant: QuantConfig | None = field(default_factory=QuantConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    mmlu: MmluConfig | None = None
    rouge: RougeConfig | None = None

    def __post_init__(self) -> None:
        if self.train.micro_batch_size % self.devices.count:
            raise ValueError(
                f"devices.count={self.devices.count} does not divide train.micro_batch_size="
                f"{self.train.micro_batch_size}, whose rows are dealt out to the devices: make "
                "that a multiple of it."
            )
        divides = self.train.optim.startswith("adamw") and not self.train.master_weights
        if divides and not np.asarray(self.train.eps).astype(jnp.dtype(self.lora.dtype)):
            raise ValueError(
                f"train.eps={self.train.eps}, by which AdamW divides, is 0 in lora.dtype="
                f"{jnp.dtype(self.lora.dtype)}: set train.master_weights=true, or take bfloat16."
            )
        if self.quant is None and self.lora.init_lora_weights == "loftq":
            raise ValueError(
                "lora.init_lora_weights is 'loftq', which makes good what quantization lost, but "
                "quant is null: leave one of them out."
            )


def named_source(known: Iterable[str], value: Any, what: str) -> Tree:
    """A `model` or `data` section from what a file may write in its place: a name, or a section."""
    if isinstance(value, str):
        return {"source": value}
    if isinstance(value, dict):
        return value
    raise ValueError(
        f"{what} is {value!r}, but should be a name ({', '.join(known)}), a path, a hub name, or a "
        "section with a source."
    )


def build_run(tree: Tree, where: str) -> RunConfig:
    """The run that a tree describes.

    Args:
        tree: as read from a file; `model` and `data` may be bare names.
        where: what to call the tree in a message.

    Raises:
        ValueError: an unknown key (the nearest one is named), or a value of the wrong kind.
    """
    tree = dict(tree)
    if "model" in tree:
        tree["model"] = named_source(MODELS, tree["model"], f"model in {where}")
    if "data" in tree:
        tree["data"] = named_source(DATASETS, tree["data"], f"data in {where}")
    run: RunConfig = convert(tree, RunConfig, "", where)
    return dataclasses.replace(run, data=_resolved(run.data, where))


def _resolved(data: DataConfig, where: str) -> DataConfig:
    """With what follows from the dataset's name written out."""
    if data.date is not None and data.format != "chat-template":
        raise ValueError(
            f"data.date in {where} is {data.date}, but only a model's own chat template may write "
            "a date: leave it out, or set data.format to chat-template."
        )
    if data.source in INSTRUCT:
        if data.format != "auto":
            raise ValueError(
                f"data.format in {where} is {data.format!r}, but {data.source} is a dataset of the "
                "paper and brings its own: leave it out, or name the rows by file or hub name."
            )
        if data.columns:
            raise ValueError(
                f"data.columns in {where} is given, but {data.source} is a dataset of the paper, "
                "whose columns are known: leave it out."
            )
        if data.name is not None:
            raise ValueError(
                f"data.name in {where} is {data.name!r}, but {data.source} is a dataset of the "
                "paper and brings its own configuration: leave it out."
            )
        return dataclasses.replace(data, train_on=data.train_on or INSTRUCT[data.source].train_on)
    if data.files is not None or data.hub_files is not None:
        raise ValueError(
            f"data.files or data.hub_files in {where} is given for {data.source!r}, but belongs to "
            f"a dataset of the paper ({', '.join(INSTRUCT)}): name the file as data.source."
        )
    data = dataclasses.replace(data, train_on=data.train_on or "response")
    if data.source in DATASETS and data.format == "auto":
        data = dataclasses.replace(data, format=DATASETS[data.source].format)
    if data.validation_split is None and (data.validation_source or data.source) in DATASETS:
        data = dataclasses.replace(data, validation_split="validation")
    return data
