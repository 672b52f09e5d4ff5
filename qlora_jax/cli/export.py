"""`qlora-jax export`: a model or an adapter into the format that somebody else reads."""

import argparse
import shutil
from pathlib import Path

from qlora_jax.checkpoints import (
    MODES,
    Checkpoint,
    cast,
    check_adapter,
    dequantized,
    merge,
    save_checkpoint,
    save_gguf,
)
from qlora_jax.checkpoints.adapter import CONFIG, WEIGHTS
from qlora_jax.checkpoints.card import CARD, model_card, read_facts
from qlora_jax.checkpoints.gguf import FILE_TYPES
from qlora_jax.checkpoints.open import read_companions
from qlora_jax.cli import SUBCOMMANDS
from qlora_jax.cli.arguments import (
    add_mode,
    add_quant,
    add_shards,
    add_source,
    count,
    folder_bytes,
    open_source,
    quant_config,
    readable,
)
from qlora_jax.files import new_folder, refuse_existing
from qlora_jax.train.run_folder import ADAPTER, adapters_by_step

FORMATS = ("safetensors", "gguf", "peft")

_READ_BY = {
    "type": (("gguf",), "--dtype is that of safetensors"),
    "dtype": (("safetensors",), "--type is that of a GGUF file"),
    "adapter": (("safetensors", "gguf"), "give the adapter's folder as SOURCE"),
    "mode": (("safetensors", "gguf"), "it copies an adapter and merges nothing"),
    "step": (("peft",), "give the folder adapters/STEP of the run as --adapter"),
}
"""Option -> the formats that read it, and what is meant with another."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """The subcommand's arguments."""
    parser = subparsers.add_parser(
        "export",
        help=SUBCOMMANDS["export"],
        description="Converts a model, or a model with an adapter merged into it, into 16-bit "
        "safetensors or a GGUF file; or copies the adapter of a run folder, finished or not, "
        "into a folder of its own with a model card (peft). One tensor is in memory at a time.",
        epilog="examples: qlora-jax export org/model model.gguf --format gguf --type Q8_0; "
        "qlora-jax export org/model out.gguf --format gguf --adapter runs/x/adapter "
        "--mode dequantized; qlora-jax export runs/x adapter --format peft --step 300",
    )
    add_source(parser)
    parser.add_argument("out", metavar="OUT", help="file (gguf) or folder to make; must not exist")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--adapter", help="folder of a PEFT adapter to merge on the way")
    add_mode(parser, required=False)
    add_quant(parser, "how a 16-bit base was quantized in training (with --adapter)")
    parser.add_argument(
        "--type",
        choices=FILE_TYPES,
        help="of a GGUF file's weights (default: Q8_0)",
    )
    parser.add_argument(
        "--dtype", help="of safetensors: float32, float16 or bfloat16 (default: as in the source)"
    )
    parser.add_argument(
        "--step", type=count, help="of peft: the adapter of this checkpoint (default: the last)"
    )
    add_shards(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes what was asked for."""
    refuse_existing(args.out)
    _refuse_unread(args)
    if args.format == "peft":
        _export_adapter(_adapter_of(Path(args.source), args.step), Path(args.out))
    else:
        checkpoint = _merged(args)
        if args.format == "gguf":
            save_gguf(args.out, checkpoint, args.type or "Q8_0")
        else:
            # In one step: not through the dtype that they had before they were quantized.
            checkpoint = dequantized(checkpoint, args.dtype)
            checkpoint = checkpoint if args.dtype is None else cast(checkpoint, args.dtype)
            save_checkpoint(args.out, checkpoint, max_shard_size=args.max_shard_size)
    print(f"{args.out}: {readable(folder_bytes(args.out))}")
    return 0


def _refuse_unread(args: argparse.Namespace) -> None:
    """An option of another format would have no effect."""
    for option, (formats, remedy) in _READ_BY.items():
        value = getattr(args, option)
        if value is not None and args.format not in formats:
            raise ValueError(
                f"--{option} is {value}, but --format {args.format} has no such option: {remedy}."
            )


def _merged(args: argparse.Namespace) -> Checkpoint:
    if (args.adapter is None) != (args.mode is None):
        raise ValueError(
            f"--adapter is {args.adapter} and --mode is {args.mode}, but they belong together: "
            f"give the adapter's folder and one of {', '.join(MODES)}."
        )
    checkpoint = open_source(args.source, args.revision)
    if args.adapter is None:
        return checkpoint
    if args.mode == "requantized":
        raise ValueError(
            f"--mode requantized makes a 4-bit folder, but --format is {args.format}: use "
            "`qlora-jax merge`, or the mode dequantized."
        )
    # What a GGUF file holds is rounded from float32.
    dtype = "float32" if args.format == "gguf" else args.dtype
    return merge(checkpoint, args.adapter, args.mode, quant=quant_config(args), dtype=dtype)


def _adapter_of(source: Path, step: int | None) -> Path:
    """Of a run folder the trained adapter, or that of a checkpoint; or a folder that is one."""
    kept = {n: f for n, f in adapters_by_step(source).items() if (f / CONFIG).is_file()}
    if step is not None and step not in kept:
        steps = ", ".join(map(str, kept)) or "no step"
        raise FileNotFoundError(
            f"--step is {step}, but {source} keeps adapters of {steps}: give one of these, or "
            "leave it out for the last."
        )
    if step is not None:
        return kept[step]
    for folder in (source / ADAPTER, *reversed(kept.values()), source):
        if (folder / CONFIG).is_file():
            return folder
    begun = (source / "checkpoints").is_dir()
    why = " (it is a run's, but fit was given no save_adapter=)" if begun else ""
    raise FileNotFoundError(
        f"{source} holds no adapter{why}: --format peft copies one out of a run folder, or out of "
        f"its own with {CONFIG}."
    )


def _export_adapter(folder: Path, out: Path) -> None:
    """An adapter's folder, and the tokenizer in it, with a card beside them."""
    check_adapter(folder)  # whole, or nothing is written
    facts = read_facts(folder)
    with new_folder(out) as partial:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(folder / name, partial / name)
        # The tokenizer, where tokens were added to it.
        for name, content in read_companions(folder).items():
            (partial / name).write_bytes(content)
        text = model_card(out.name, facts)
        (partial / CARD).write_text(text, encoding="utf-8")
