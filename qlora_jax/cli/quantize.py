"""`qlora-jax quantize`: a 16-bit model into a bitsandbytes 4-bit folder, one tensor at a time."""

import argparse

from qlora_jax.checkpoints import cast, packable_weights, quantized, save_checkpoint
from qlora_jax.cli import SUBCOMMANDS
from qlora_jax.cli.arguments import (
    add_quant,
    add_shards,
    add_source,
    folder_bytes,
    open_source,
    quant_config,
    readable,
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """The subcommand's arguments."""
    parser = subparsers.add_parser(
        "quantize",
        help=SUBCOMMANDS["quantize"],
        description="Quantizes the linear weights of a model's layers into a new folder that "
        "transformers with bitsandbytes loads, and `load_pretrained` too, without a conversion. "
        "Embeddings, head, norms and a T5's wo keep their dtype. One tensor is in memory at a "
        "time.",
        epilog="example: qlora-jax quantize meta-llama/Llama-3.1-8B llama-3.1-8b-nf4",
    )
    add_source(parser)
    parser.add_argument("out", metavar="OUT", help="folder to make; must not exist")
    add_quant(parser, "quantization")
    parser.add_argument(
        "--dtype",
        help="of what is not quantized, and what the 4-bit weights dequantize to in transformers: "
        "float32, float16 or bfloat16 (default: as in the source)",
    )
    add_shards(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the folder."""
    quant = quant_config(args)
    checkpoint = open_source(args.source, args.revision)
    result = quantized(checkpoint, packable_weights(checkpoint), quant, dtype=args.dtype)
    if args.dtype is not None:
        result = cast(result, args.dtype)
    save_checkpoint(args.out, result, max_shard_size=args.max_shard_size)
    print(f"{args.out}: {readable(folder_bytes(args.out))}, {quant}")
    return 0
