"""What a sweep would do and what it would cost, cell by cell, with nothing run or downloaded.

Tokens are counted where a cell's rows and its model's tokenizer are at hand; elsewhere they are the
most that the lengths allow, and said to be so ("≤"). FLOPs, memory and hours: experiments/estimate.
Embedded models and folders are read, hub models looked up in the local cache; of LLaMA the shapes
are known. `--compile` asks the compiler for the memory instead (`qlora_jax.plan`): half a minute
for every shape of step, kept for the next time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from experiments.cells import Sweep
from experiments.config import RunConfig
from experiments.embedded import DATASETS, MODELS
from experiments.estimate import flops_per_token, hours, memory
from experiments.presets import SHAPES
from experiments.room import check_lengths, row_length, workload
from experiments.rows import context_length, examples_of, longest_allowed, model_config
from experiments.run import dated, is_finished
from pallas_kernels.cards import Card
from qlora_jax.data import INSTRUCT, Pairs, load_tokenizer
from qlora_jax.data.packing import pack
from qlora_jax.models import DecoderConfig
from qlora_jax.plan import USABLE, find_config, plan

CARDS = ("rtx-4090", "a6000", "a100-80", "h100")


@dataclass(frozen=True)
class CellEstimate:
    """What one cell would take.

    Attributes:
        rows: training rows; None where they are not at hand.
        tokens: read in training; an upper bound where `rows` is None.
        flops: of training; None where the model's shape is not at hand, as the others.
        device_bytes: in a step, on each device.
        host_bytes: in pinned host memory, for all devices.
        devices: that share the work.
    """

    rows: int | None
    tokens: int | None
    flops: float | None
    device_bytes: int | None
    host_bytes: int | None
    devices: int = 1


def estimate(run: RunConfig, *, compiled_for: Card | None = None) -> CellEstimate:
    """What a run would take, from what is at hand.

    Args:
        run: the run.
        compiled_for: take the memory from the compiler, for this card.

    Raises:
        ValueError: the rows or the model at hand are wrong.
    """
    folder = _model_at_hand(run)
    config = _shape(run, folder)
    rows, mean, longest = _lengths(run, folder)
    examples = run.train.steps * run.train.batch_size
    tokens = None if mean is None else round(mean * examples)
    if config is None or tokens is None or longest is None:
        return CellEstimate(rows, tokens, None, None, None, run.devices.count)
    flops = tokens * flops_per_token(config, run.lora, longest, run.model.remat)
    if compiled_for is not None:
        device, host = _compiled(run, config, longest, compiled_for)
    else:
        held = memory(config, run, longest)
        device, host = held.device, held.host
    return CellEstimate(rows, tokens, flops, device, host, run.devices.count)


def _model_at_hand(run: RunConfig) -> Path | None:
    source = run.model.source
    folder = Path(MODELS.get(source, source)).expanduser()
    if folder.is_dir():
        return folder
    try:
        found = snapshot_download(source, revision=run.model.revision, local_files_only=True)
    except (OSError, HfHubHTTPError, HFValidationError):
        return None
    return Path(found)


def _shape(run: RunConfig, folder: Path | None) -> DecoderConfig | None:
    if folder is not None and (folder / "config.json").is_file():
        config = model_config(folder)
        return config if isinstance(config, DecoderConfig) else None
    if run.model.source not in SHAPES:
        return None
    known = find_config(SHAPES[run.model.source])
    return known if isinstance(known, DecoderConfig) else None


def _lengths(run: RunConfig, folder: Path | None) -> tuple[int | None, float | None, int | None]:
    """(training rows, tokens in the mean of what a batch counts as a row, tokens of the longest,
    padding included): counted, or what is allowed."""
    data = run.data
    local = data.files if data.source in INSTRUCT else data.source
    held_out = data.validation_source or local
    rows_are_there = _is_at_hand(local) and _is_at_hand(held_out)
    if folder is not None and rows_are_there and _has_tokenizer(folder):
        train, validation, _ = examples_of(data, folder, data.max_len or context_length(folder))
        check_lengths(data, train, validation)
        if isinstance(train, Pairs):
            return len(train), None, None
        length = row_length(data, int(train.lengths.max()))
        rows = len(pack(train.lengths, length)) if data.packing else len(train)
        return len(train), train.tokens / rows, length
    most = longest_allowed(data)
    if most is None:
        return None, None, None
    length = row_length(data, most)
    return None, float(length if data.packing else most), length


def _is_at_hand(source: str | None) -> bool:
    return source in DATASETS or (source is not None and Path(source).expanduser().exists())


@functools.cache
def _has_tokenizer(folder: Path) -> bool:
    """Of a hub model there may be no more than its config.json."""
    try:
        load_tokenizer(folder)
    except FileNotFoundError:
        return False
    return True


def _compiled(run: RunConfig, config: DecoderConfig, length: int, card: Card) -> tuple[int, int]:
    found = plan(workload(run, config, length), card)
    return found.device.total, found.host * run.devices.count


def dry_run(
    sweep: Sweep, out: Path, console: Console, cards: Sequence[Card], *, compiled: bool = False
) -> None:
    """Lists the cells with what they would train on and take, and which are finished."""
    count = len(sweep.cells)
    several = len({cell.labels["seed"] for cell in sweep.cells}) > 1
    labels = [name for name in sweep.cells[0].labels if several or name != "seed"]
    rows: list[dict[str, str]] = []
    totals, bounded = [0.0] * len(cards), False
    for cell in sweep.cells:
        found = estimate(cell.run, compiled_for=cards[0] if compiled else None)
        times = [_hours_on(found, card) for card in cards]
        totals = [total + (time or 0.0) for total, time in zip(totals, times, strict=True)]
        bounded |= found.rows is None
        folder = out / cell.name
        status = "finished" if is_finished(dated(cell.run, folder), folder) else "to run"
        rows.append(
            {name: cell.labels[name] for name in labels}
            | _described(cell.run, found)
            | _by_card(cards, times)
            | {"status": status}
        )
    if all(row["epochs"] == "?" for row in rows):
        rows = [{name: text for name, text in row.items() if name != "epochs"} for row in rows]
    total = None
    if count > 1 and any(totals):
        total = {labels[0]: "all that fit"} | _by_card(cards, totals)
    console.print(f"{sweep.name}: {count} cell(s) in {out}", style="italic", highlight=False)
    for table in _tables(console, labels, rows, total):
        console.print(table)
    how = f"compiled for {cards[0].name}" if compiled else "experiments/estimate.py"
    notes = [
        f"device and host: GiB in a step ({how}); under a card: hours, – where it is too small."
    ]
    if any(cell.run.devices.count > 1 for cell in sweep.cells):
        notes.append(
            "of cells on several devices: each device's GiB, the host's for all, hours of all "
            "together at work."
        )
    if bounded:
        notes.append("≤: rows or tokenizer not at hand, the most tokens that the lengths allow.")
    console.print("\n".join(notes), highlight=False)


def _tables(
    console: Console,
    labels: Sequence[str],
    rows: Sequence[dict[str, str]],
    total: dict[str, str] | None,
) -> list[Table]:
    """One table; where the terminal is too narrow, what cells train on and then what they take."""
    numbers = [name for name in rows[0] if name not in labels]
    whole = _table(labels, numbers, rows, total)
    unbounded = console.options.update_width(10_000)
    if console.measure(whole, options=unbounded).maximum <= console.width:
        return [whole]
    device, status = numbers.index("device"), numbers.index("status")
    return [
        _table(labels, [*numbers[:device], "status"], rows, None),
        _table(labels, numbers[device:status], rows, total),
    ]


def _table(
    labels: Sequence[str],
    numbers: Sequence[str],
    rows: Sequence[dict[str, str]],
    total: dict[str, str] | None,
) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for name in labels:
        # Where the terminal is narrow these fold, and the numbers stay whole.
        table.add_column(name, overflow="fold", min_width=6)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in (*labels, *numbers)))
    if total is not None:
        table.add_section()
        table.add_row(*(total.get(name, "") for name in (*labels, *numbers)))
    return table


def _described(run: RunConfig, found: CellEstimate) -> dict[str, str]:
    quant = run.quant
    dq = "+DQ" if quant is not None and quant.double_quant else ""
    tokens = "?" if found.tokens is None else _count(found.tokens)
    return {
        "base": "16-bit" if quant is None else quant.quant_type + dq,
        "steps": f"{run.train.steps:,}",
        "batch": str(run.train.batch_size),
        "rows": "?" if found.rows is None else f"{found.rows:,}",
        "epochs": _epochs(run, found.rows),
        "tokens": ("≤" if found.rows is None and found.tokens is not None else "") + tokens,
        "FLOP": "?" if found.flops is None else f"{found.flops:.2e}".replace("e+", "e"),
        "device": _size(found.device_bytes),
        "host": _size(found.host_bytes),
    }


def _epochs(run: RunConfig, rows: int | None) -> str:
    """Passes over the rows; how many fill a packed one is not known here."""
    if rows is None or run.data.packing:
        return "?"
    return f"{run.train.steps / math.ceil(rows / run.train.batch_size):.2f}"


def _by_card(cards: Sequence[Card], times: Sequence[float | None]) -> dict[str, str]:
    return {card.name: _time(time) for card, time in zip(cards, times, strict=True)}


def _count(tokens: int) -> str:
    return f"{tokens / 1e6:.1f}M" if tokens >= 1e6 else f"{tokens / 1e3:.1f}k"


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    return f"{count / 2**30:.{1 if count >= 2**29 else 3}f}"


def _hours_on(found: CellEstimate, card: Card) -> float | None:
    """None where it does not fit, or where nothing is known."""
    if found.flops is None or found.device_bytes is None:
        return None
    if found.device_bytes > USABLE * card.memory:
        return None
    return hours(found.flops, card) / found.devices


def _time(time: float | None) -> str:
    if time is None:
        return "–"
    return f"{time:,.1f}" if time >= 0.1 else f"{time:.0e}"
