"""`qlora-jax inspect`: a model's tree with shapes, bits per weight and bytes, from its headers."""

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from qlora_jax.checkpoints.adapter import CONFIG, WEIGHTS
from qlora_jax.checkpoints.bitsandbytes import is_part, packed_names, read_state
from qlora_jax.checkpoints.folder import INDEX, SINGLE, WeightFolder
from qlora_jax.checkpoints.gguf import GGUFFile
from qlora_jax.cli import SUBCOMMANDS
from qlora_jax.cli.arguments import SOURCE_HELP, readable
from qlora_jax.pretrained import find_source

_ITEM_BITS = {"F64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """The subcommand's arguments."""
    parser = subparsers.add_parser(
        "inspect",
        help=SUBCOMMANDS["inspect"],
        description="Prints the tensors of a model or an adapter as they are stored, layers "
        "together: how many, shape, data type, bits per weight (scales included) and bytes. Only "
        "headers are read, so a model of any size takes a moment and no memory.",
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP + ", or an adapter's folder")
    parser.add_argument("--revision", help="branch, tag or commit, of a hub name")
    parser.add_argument("--layers", action="store_true", help="one row for each layer's tensor")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.set_defaults(run=run)


class Row(NamedTuple):
    """Tensors of one name, but for the layer's number, and of one shape and type.

    Attributes:
        name: with `*` for the layer.
        count: how many.
        shape: of each.
        stored: data type, and how it is quantized.
        nbytes: of all, with everything that belongs to them.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    stored: str
    nbytes: int

    @property
    def weights(self) -> int:
        """Numbers in all of them."""
        return self.count * math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Per weight."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    source = find_source(args.source, revision=args.revision)
    rows = [Row(name, 1, *rest) for name, *rest in _stored(source)]
    if not args.layers:
        rows = together(rows)
    if args.json:
        for row in rows:
            print(json.dumps(row._asdict() | {"bits_per_weight": row.bits}))
        return 0
    table = Table(box=None, pad_edge=False)
    for title, side in [
        ("tensor", "left"),
        ("", "right"),
        ("shape", "left"),
        ("stored as", "left"),
        ("bits/weight", "right"),
        ("bytes", "right"),
    ]:
        table.add_column(title, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(
            row.name,
            "" if row.count == 1 else f"{row.count} ×",
            " × ".join(map(str, row.shape)) or "scalar",
            row.stored,
            f"{row.bits:.3f}",
            readable(row.nbytes),
        )
    weights, nbytes = sum(row.weights for row in rows), sum(row.nbytes for row in rows)
    console = Console(highlight=False)
    # A name that is cut off names nothing; a narrow terminal wraps the line instead.
    console.width = max(console.width, 160)
    console.print(table)
    bits = 8 * nbytes / weights if weights else 0.0
    console.print(f"\n{weights:,} weights, {bits:.3f} bits per weight, {readable(nbytes)}")
    return 0


def together(rows: list[Row]) -> list[Row]:
    """Rows that differ only in numbers inside their names, as one; the order is the first's."""
    found: dict[tuple, Row] = {}
    for row in rows:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", row.name)
        key = (name, row.shape, row.stored)
        seen = found.get(key, Row(name, 0, row.shape, row.stored, 0))
        found[key] = seen._replace(count=seen.count + 1, nbytes=seen.nbytes + row.nbytes)
    return list(found.values())


def _stored(source: Path) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    """Name, shape, data type and bytes of each weight."""
    if source.is_dir() and (source / CONFIG).is_file():
        yield from _dense(WeightFolder(source, WEIGHTS))
    elif source.is_dir() and not _has_safetensors(source) and list(source.glob("*.gguf")):
        for path in sorted(source.glob("*.gguf")):
            yield from _gguf(path)
    elif source.is_dir():
        yield from _folder(WeightFolder(source))
    else:
        yield from _gguf(source)


def _has_safetensors(folder: Path) -> bool:
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def _gguf(path: Path) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    for name, tensor in GGUFFile(path).tensors.items():
        yield name, tensor.shape, tensor.kind.name, tensor.nbytes


def _dense(weights: WeightFolder) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    for name in weights:
        yield name, weights.shapes[name], weights.dtypes[name].lower(), _bytes(weights, name)


def _bytes(weights: WeightFolder, name: str) -> int:
    bits = _ITEM_BITS.get(weights.dtypes[name], 64 if "64" in weights.dtypes[name] else 8)
    return math.prod(weights.shapes[name]) * bits // 8


def _folder(weights: WeightFolder) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    packed = packed_names(weights)
    parts: Mapping[str, list[str]] = {name: [] for name in packed}
    for part in weights:
        owner = next((part[:i] for i in _prefixes(part) if part[:i] in packed), None)
        if owner is not None:
            parts[owner].append(part)
    for name in weights:
        if name in packed:
            state = read_state(weights, name)
            double = "+dq" if state.config.double_quant else ""
            stored = f"{state.config.quant_type}{double}, block {state.config.blocksize}"
            nbytes = sum(_bytes(weights, part) for part in (name, *parts[name]))
            yield name, state.shape, stored, nbytes
        elif not (packed and is_part(name)):
            yield name, weights.shapes[name], weights.dtypes[name].lower(), _bytes(weights, name)


def _prefixes(name: str) -> list[int]:
    """Where a name could be cut into a weight's and a part's."""
    return [match.start() for match in re.finditer(r"\.", name)]
