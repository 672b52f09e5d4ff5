"""The rows of a run: found, held out, cut, and tokenized for its model.

Tokenized datasets are kept between runs of one process: a sweep reads each one once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from experiments.config import DataConfig
from experiments.embedded import DATASETS, MODELS
from qlora_jax.checkpoints import refuse_adapter
from qlora_jax.data import (
    FORMATS,
    INSTRUCT,
    ChatTemplateFormat,
    ConversationFormat,
    Examples,
    Format,
    InstructionFormat,
    PairFormat,
    Pairs,
    Tokenizer,
    detect_format,
    get_format,
    load_chat_template,
    load_instruct,
    load_rows,
    load_tokenizer,
    tokenize_pairs,
    tokenize_rows,
)
from qlora_jax.data.json_file import read_json
from qlora_jax.models import EncoderClassifier, EncoderDecoderConfig, family_of
from qlora_jax.pretrained import find_folder


def find_model(source: str, **options: Any) -> Path:
    """A model's local folder, by an embedded one's name or by what `find_folder` takes, which gets
    the options and may raise; ValueError for what is nearly an embedded one's name."""
    near = difflib.get_close_matches(source, MODELS, n=1, cutoff=0.8)
    if near and source not in MODELS and not Path(source).exists():
        raise ValueError(
            f"{source} is neither a folder here nor an embedded model; the nearest of these is "
            f"{near[0]} (there are {', '.join(MODELS)})."
        )
    folder = find_folder(MODELS.get(source, source), **options)
    refuse_adapter(folder)
    return folder


def context_length(folder: Path) -> int | None:
    """The model's longest sequence; None for an encoder–decoder, whose positions are distances and
    have no end. Raises as `model_config`."""
    return getattr(model_config(folder), "max_position_embeddings", None)


def decoder_context(folder: Path) -> int:
    """As `context_length`; ValueError for an encoder–decoder, too."""
    context = context_length(folder)
    if context is None:
        raise ValueError(f"{folder} is an encoder–decoder, but a decoder is asked here.")
    return context


@functools.lru_cache(maxsize=16)
def model_config(folder: Path) -> Any:
    """The model's configuration, from a config.json of a known architecture.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: it is damaged, or of an architecture that is not known or writes no text.
    """
    raw = read_json(folder / "config.json")
    try:
        family = family_of(raw)
        if family.build is EncoderClassifier:
            raise ValueError(
                f"a {family.model_type!r} is a classifier and learns from labels: finetune it with "
                "python -m experiments.paper.glue."
            )
        return family.read_config(raw)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


@functools.lru_cache(maxsize=64)
def examples_of(
    data: DataConfig, folder: Path, longest: int | None
) -> tuple[Examples | Pairs, Examples | Pairs, int]:
    """What a run trains on, what it is held against, and the id that fills rows up.

    Args:
        data: which rows.
        folder: the model's, for its tokenizer and chat template.
        longest: refuse examples of more tokens; None: of any length.

    Raises:
        ValueError, OSError: what is wrong with the rows, in a sentence.
    """
    tokenizer = load_tokenizer(folder)
    pad = tokenizer.pad_token_id
    train_rows, validation_rows, form = _split_rows(data, folder)
    if data.max_rows is not None:
        train_rows = _first(train_rows, data.max_rows)
    trained = f"{data.source} (training)"
    if isinstance(model_config(folder), EncoderDecoderConfig):
        train_pairs = _pairs(train_rows, form, data, tokenizer, trained)
        held_out = _pairs(validation_rows, form, data, tokenizer, f"{data.source} (validation)")
        by_source = sorted(held_out, key=lambda pair: len(pair.source))
        return train_pairs, Pairs(by_source), pad
    train = _tokenize(train_rows, form, data, tokenizer, longest, trained)
    return train, _held_out_examples(validation_rows, form, data, tokenizer, longest), pad


@functools.lru_cache(maxsize=64)
def answers_of(data: DataConfig, folder: Path, longest: int | None) -> Examples | Pairs:
    """The held-out rows that `examples_of` gives, with loss on their answers alone, also where that
    is taken on all.

    Raises:
        ValueError, OSError: as `examples_of` does; the rows do not tell what is an answer.
    """
    if data.train_on != "all" or isinstance(model_config(folder), EncoderDecoderConfig):
        return examples_of(data, folder, longest)[1]
    data = dataclasses.replace(data, train_on="response")
    _, rows, form = _split_rows(data, folder)
    return _held_out_examples(rows, form, data, load_tokenizer(folder), longest)


# Tokens of a response to an instruction, as the paper cuts Alpaca's; and of a row that is no
# instruction, as it cuts OASST1's.
_RESPONSE, _WHOLE = 128, 512


def target_limit(data: DataConfig, form: Format, longest: int | None) -> int | None:
    """Tokens that a target is cut to in that format, None for no limit.

    "auto" leaves a conversation or plain text, which have no prompt apart, 512 or the `longest`
    that the model takes, less the bos token in front.
    """
    if data.target_max_len != "auto":
        return data.target_max_len
    return _RESPONSE if _has_prompt(form) else min(_WHOLE, longest or _WHOLE) - 1


def longest_allowed(data: DataConfig) -> int | None:
    """Tokens of the longest example that the limits let through, in any format that the rows may
    have; None where there is no limit."""
    if data.source in INSTRUCT:
        forms = [schema.form for schema in INSTRUCT[data.source].schemas]
    else:
        forms = [FORMATS[data.format]] if data.format in FORMATS else list(FORMATS.values())
    lengths = []
    for form in forms:
        source = data.source_max_len if _has_prompt(form) else 1  # bos
        target = target_limit(data, form, None)
        if source is None or target is None:
            return None
        lengths.append(source + target)
    return max(lengths)


def _has_prompt(form: Format) -> bool:
    return isinstance(form, InstructionFormat | PairFormat)


def told_of_cuts(data: DataConfig, examples: Examples | Pairs) -> str:
    """What tokenization has cut off or left out of the training rows, in a sentence; "" where that
    is nothing."""
    report = examples.report
    if report is None:
        return ""
    limit = f"data.target_max_len={data.target_max_len}"
    if data.target_max_len == "auto":
        limit += f" ({_RESPONSE} tokens, of conversations and texts at most {_WHOLE})"
    told = [
        f"{what}: {count:,}"
        for count, what in (
            (report.cut_sources, f"prompts cut to data.source_max_len={data.source_max_len}"),
            (report.cut_targets, f"responses cut to {limit}"),
            (report.left_out, "left out, without a token to train on"),
        )
        if count
    ]
    return f"of {report.rows:,} training rows, {'; '.join(told)}" if told else ""


def _split_rows(data: DataConfig, folder: Path) -> tuple[Any, Any, Format]:
    """Training rows, held-out rows, and the format of both."""
    parts = None if data.hub_files is None else list(data.hub_files)
    if data.source in INSTRUCT:
        rows, form, _ = load_instruct(data.source, data.files, data.split, data_files=parts)
    else:
        split = data.split or ("train" if data.source in DATASETS else None)
        rows = load_rows(_place(data.source), split, name=data.name, columns=data.columns)
        form = _format(data, folder, rows.column_names)
    if data.validation_source is None and data.validation_split is None:
        if len(rows) <= data.validation_rows:
            raise ValueError(
                f"{data.source} has {len(rows)} rows, but {data.validation_rows} are to be held "
                "out: lower data.validation_rows, or name a data.validation_split."
            )
        train, held_out = _held_out(rows, data.validation_rows)
        return train, held_out, form
    if data.source in INSTRUCT:
        files = data.validation_source or data.files
        parts = None if data.validation_source else parts
        held_out, other, _ = load_instruct(
            data.source, files, data.validation_split, data_files=parts
        )
        if other != form:
            raise ValueError(
                f"the validation rows of {data.source} are in another schema than its training "
                "rows: give files of one."
            )
    else:
        name = None if data.validation_source else data.name
        held_out = load_rows(
            _place(data.validation_source or data.source),
            data.validation_split,
            name=name,
            columns=data.columns,
        )
    return rows, _first(held_out, data.validation_rows), form


def _place(source: str) -> str | Path:
    """Where `load_rows` finds a source that is no dataset of the paper.

    Raises:
        FileNotFoundError: it is nothing but nearly the name of one, or of an embedded one.
    """
    if source in DATASETS:
        return DATASETS[source].folder
    names = [*DATASETS, *INSTRUCT]
    near = difflib.get_close_matches(source.lower(), names, n=1)
    if near and "/" not in source and not Path(source).exists():
        raise FileNotFoundError(
            f"{source} is neither a file or folder here nor a dataset's name; the nearest of "
            f"these is {near[0]} (there are {', '.join(names)})."
        )
    return source


def _held_out(rows: Any, count: int) -> tuple[Any, Any]:
    """(the rest, `count` rows), the same ones for every seed, or seeds could not be compared."""
    import datasets

    if not isinstance(rows, datasets.Dataset):
        # Rows that were taken apart are a list: the same permutation as of a Dataset.
        chosen = datasets.Dataset.from_dict({"row": range(len(rows))})
        halves = chosen.train_test_split(test_size=count, seed=0)
        return [rows[i] for i in halves["train"]["row"]], [rows[i] for i in halves["test"]["row"]]
    halves = rows.train_test_split(test_size=count, seed=0)
    return halves["train"], halves["test"]


def _first(rows: Any, count: int) -> Sequence[Any]:
    count = min(len(rows), count)
    return rows[:count] if isinstance(rows, list) else rows.select(range(count))


def _format(data: DataConfig, folder: Path, columns: list[str]) -> Format:
    if data.format == "chat-template":
        template = load_chat_template(folder)
        if data.date is not None:
            template = dataclasses.replace(template, date=date.fromisoformat(data.date))
        return ChatTemplateFormat(template, system=data.system_prompt)
    named = data.format != "auto"
    form = get_format(data.format) if named else detect_format(columns, source=data.source)
    if data.system_prompt is None:
        return form
    if isinstance(form, ConversationFormat):
        return dataclasses.replace(form, system=data.system_prompt)
    raise ValueError(
        f"data.system_prompt is given, but the format {form.name!r} knows no system turns: it "
        "belongs to conversations (messages, messages-chatml, chat-template)."
    )


def _pairs(rows: Any, form: Format, data: DataConfig, tokenizer: Tokenizer, name: str) -> Pairs:
    return tokenize_pairs(
        rows,
        form,
        tokenizer,
        source_max_len=data.source_max_len,
        target_max_len=target_limit(data, form, None),
        source=name,
    )


def _tokenize(
    rows: Any, form: Format, data: DataConfig, tokenizer: Tokenizer, longest: int | None, name: str
) -> Examples:
    return tokenize_rows(
        rows,
        form,
        tokenizer,
        train_on=data.train_on or "response",
        source_max_len=data.source_max_len,
        target_max_len=target_limit(data, form, longest),
        max_len=longest,
        source=name,
    )


def _held_out_examples(
    rows: Any, form: Format, data: DataConfig, tokenizer: Tokenizer, longest: int | None
) -> Examples:
    examples = _tokenize(rows, form, data, tokenizer, longest, f"{data.source} (validation)")
    # The loss does not depend on the order, the padding does.
    by_length = sorted(examples, key=lambda example: len(example.input_ids))
    return Examples.of(by_length)
