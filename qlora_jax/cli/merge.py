"""`qlora-jax merge`: an adapter into its base, and how far the result is from what was trained."""

import argparse
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints import (
    Checkpoint,
    checkpoint_tokenizer,
    load_adapter,
    load_model,
    merge,
    read_adapter_config,
    save_checkpoint,
)
from qlora_jax.checkpoints.checkpoint import DTYPES
from qlora_jax.checkpoints.safetensors_writer import parse_size
from qlora_jax.cli import SUBCOMMANDS
from qlora_jax.cli.arguments import (
    SOURCE_HELP,
    add_mode,
    add_quant,
    add_shards,
    folder_bytes,
    open_source,
    quant_config,
    readable,
)
from qlora_jax.evaluate import drift, token_logits, windows
from qlora_jax.files import refuse_existing
from qlora_jax.models import Decoder, family_of
from qlora_jax.quant import QuantConfig


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """The subcommand's arguments."""
    parser = subparsers.add_parser(
        "merge",
        help=SUBCOMMANDS["merge"],
        description="Merges an adapter into its base and writes a new model folder (16-bit "
        "safetensors, or bitsandbytes 4-bit with --mode requantized), one tensor at a time. Then "
        "reports, on a sample text, how far its logits and its perplexity are from those of the "
        "unmerged model, the quantized base with the adapter beside it.",
        epilog="example: qlora-jax merge meta-llama/Llama-3.1-8B runs/x/adapter merged "
        "--mode dequantized",
    )
    parser.add_argument("base", metavar="BASE", help=SOURCE_HELP)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a PEFT adapter")
    parser.add_argument("out", metavar="OUT", help="folder to make; must not exist")
    add_mode(parser, required=True)
    parser.add_argument("--revision", help="branch, tag or commit, if the base is a hub name")
    add_quant(parser, "how a 16-bit base was quantized in training")
    add_shards(parser)
    report = parser.add_argument_group("drift report")
    report.add_argument(
        "--sample", type=Path, metavar="FILE", help="text to compare on (default: a short own one)"
    )
    report.add_argument(
        "--tokens", type=int, default=1024, metavar="N", help="at most so many (default: 1024)"
    )
    report.add_argument("--no-report", action="store_true", help="merge only; loads no model")
    report.add_argument("--json", action="store_true", help="print the report as one JSON line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the folder, prints the report."""
    refuse_existing(args.out)
    base, quant = open_source(args.base, args.revision), quant_config(args)
    result = merge(base, args.adapter, args.mode, quant=quant)
    parse_size(args.max_shard_size)
    if args.no_report:
        save_checkpoint(args.out, result, max_shard_size=args.max_shard_size)
        print(f"{args.out}: {readable(folder_bytes(args.out))}, {args.mode}")
        return 0
    ids = _sample(base, args.sample, args.tokens)
    # Before anything is written: an adapter that does not fit its base shows here.
    before = unmerged_logits(base, args.adapter, ids, quant)
    save_checkpoint(args.out, result, max_shard_size=args.max_shard_size)
    size = folder_bytes(args.out)
    moved = drift(before, merged_logits(result, ids), ids)
    if args.json:
        print(json.dumps({"out": args.out, "mode": args.mode, "bytes": size} | moved._asdict()))
        return 0
    print(
        f"{args.out}: {readable(size)}, {args.mode}; beside the unmerged model on {moved.tokens} "
        f"tokens:\n"
        f"  logits       mean |Δ| {moved.mean_abs:.2e}, max |Δ| {moved.max_abs:.2e}\n"
        f"  KL           {moved.kl:.2e} nats per token\n"
        f"  perplexity   {moved.perplexity_before:.4f} → {moved.perplexity_after:.4f}"
    )
    return 0


def unmerged_logits(
    base: Checkpoint, adapter: str | Path, ids: np.ndarray, quant: QuantConfig
) -> list[np.ndarray]:
    """What the quantized base with the adapter beside it says of a sample, computed in float32.

    Args:
        base: as `merge` was given it.
        adapter: its folder.
        ids: the sample, int32 [window, length].
        quant: how a 16-bit base was quantized in training.
    """
    lora = read_adapter_config(adapter)
    unmerged = load_model(base, quant=base.quant or quant, lora=lora, **_F32)
    load_adapter(adapter, unmerged)
    return token_logits(unmerged, ids)


def merged_logits(result: Checkpoint, ids: np.ndarray) -> list[np.ndarray]:
    """What the merged model says of it, computed in float32."""
    # Weights stay in the dtype of the file: what is measured is that file.
    dtype = DTYPES[next(iter(result.tensors.values())).dtype]
    merged = load_model(result, quant=result.quant, lora=None, param_dtype=dtype, **_F32)
    return token_logits(merged, ids)


_F32: dict[str, Any] = {"compute_dtype": jnp.float32, "remat": "none", "attention": "xla"}


def _sample(base: Checkpoint, path: Path | None, tokens: int) -> np.ndarray:
    if tokens < 2:
        raise ValueError(
            f"--tokens is {tokens}, but at least 2 are needed: one to read and one to predict."
        )
    family = family_of(base.config)
    if family.build is not Decoder:
        raise ValueError(
            f"The drift report reads a text with a decoder, but {base.source} is a "
            f"{family.model_type!r}: give --no-report."
        )
    if path is None:
        text = (resources.files("qlora_jax.cli") / "sample.txt").read_text(encoding="utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path} does not exist: give --sample a file of plain text."
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is no text in UTF-8 ({error.reason}): give --sample a file of plain text."
            ) from error
    longest = family.read_config(base.config).max_position_embeddings
    ids = checkpoint_tokenizer(base).encode(text)
    return windows(ids, min(256, longest), tokens)
