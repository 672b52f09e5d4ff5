"""Arguments that several subcommands share, and what they stand for."""

import argparse
from pathlib import Path

from qlora_jax.checkpoints import MODES, Checkpoint, check_shapes, open_checkpoint
from qlora_jax.checkpoints.save import MAX_SHARD_SIZE
from qlora_jax.nn.lora import SEEDS
from qlora_jax.pretrained import find_source
from qlora_jax.quant import QuantConfig

SOURCE_HELP = "a model folder (16-bit or bitsandbytes 4-bit), a .gguf file, or a hub name org/name"


def add_source(parser: argparse.ArgumentParser, name: str = "source") -> None:
    """A model to read, and its revision."""
    parser.add_argument(name, metavar=name.upper(), help=SOURCE_HELP)
    parser.add_argument("--revision", help="branch, tag or commit, of a hub name")


def open_source(name: str, revision: str | None) -> Checkpoint:
    """What `add_source` was given, opened, its shapes compared with its config."""
    checkpoint = open_checkpoint(find_source(name, revision=revision))
    check_shapes(checkpoint)
    return checkpoint


def seed(text: str) -> int:
    """The value of a `--seed`, as `add_argument(type=seed)` takes it."""
    number = int(text)
    if number not in SEEDS:
        raise argparse.ArgumentTypeError(f"{number} is no seed: give one from 0 to {SEEDS[-1]}")
    return number


def count(text: str) -> int:
    """The value of a `--limit` and its like, as `add_argument(type=count)` takes it."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few: give 1 or more")
    return number


def add_quant(parser: argparse.ArgumentParser, title: str) -> None:
    """How a model is quantized; `quant_config` reads the answers."""
    group = parser.add_argument_group(title)
    default = QuantConfig()
    group.add_argument(
        "--quant-type",
        default=default.quant_type,
        metavar="TYPE",
        help="nf4 or fp4 (default: nf4)",
    )
    group.add_argument(
        "--blocksize",
        type=int,
        default=default.blocksize,
        metavar="N",
        help="weights that share a scale (default: 64)",
    )
    group.add_argument(
        "--no-double-quant",
        dest="double_quant",
        action="store_false",
        help="keep the scales in float32 (4.5 bits per weight instead of 4.127)",
    )


def quant_config(args: argparse.Namespace) -> QuantConfig:
    """The answers of `add_quant`."""
    return QuantConfig(args.quant_type, args.blocksize, args.double_quant)


def add_mode(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Which base an adapter is merged into."""
    parser.add_argument(
        "--mode",
        choices=MODES,
        required=required,
        help="original: into the 16-bit weights; dequantized: into the numbers that the 4-bit "
        "codes stand for, which is what training saw; requantized: the same, in 4 bits again "
        "(docs/merging.md says which to choose)",
    )


def add_shards(parser: argparse.ArgumentParser) -> None:
    """How large a file may grow."""
    parser.add_argument(
        "--max-shard-size",
        default=MAX_SHARD_SIZE,
        metavar="SIZE",
        help=f"split safetensors at this size (default: {MAX_SHARD_SIZE})",
    )


def readable(nbytes: int | float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def folder_bytes(path: str | Path) -> int:
    """Size of a file, or of a folder's files together."""
    path = Path(path)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
