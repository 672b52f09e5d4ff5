"""What `generate` and `chat` share: which model writes, and how it writes."""

import argparse
from pathlib import Path
from typing import Any

import jax

from qlora_jax.checkpoints import (
    checkpoint_tokenizer,
    load_adapter,
    load_model,
    open_checkpoint,
    read_adapter_config,
)
from qlora_jax.checkpoints.checkpoint import DTYPES, dtype_name
from qlora_jax.cli.arguments import SOURCE_HELP, add_quant, quant_config, seed
from qlora_jax.data import Tokenizer
from qlora_jax.generate import GenerationConfig, read_eos_token_ids


def add_writing(parser: argparse.ArgumentParser) -> None:
    """The model, its adapter, and how it samples."""
    parser.add_argument("model", metavar="MODEL", help=SOURCE_HELP)
    parser.add_argument("--revision", help="branch, tag or commit, of a hub name")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="of a PEFT adapter")
    parser.add_argument("--dtype", default="bfloat16", help="of the computation")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=256)
    sampling.add_argument(
        "--temperature", type=float, default=0.7, help="0: the most likely token each time"
    )
    sampling.add_argument("--top-p", type=float, default=0.9)
    sampling.add_argument("--top-k", type=int)
    sampling.add_argument("--seed", type=seed, default=0)
    parser.add_argument(
        "--16-bit", dest="dense", action="store_true", help="do not quantize the base"
    )
    add_quant(parser, "how a 16-bit base is quantized")
    parser.add_argument(
        "--embedding-bits", type=int, choices=[8, 4], help="embedding and head packed (16 bits)"
    )


def load_writer(
    args: argparse.Namespace, path: Path
) -> tuple[Any, Tokenizer, GenerationConfig, jax.Array]:
    """The model that lies at `path`, its tokenizer, how to sample, and the key of the samples."""
    # Refused before a large model is read.
    config = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    checkpoint = open_checkpoint(path)
    model = load_model(
        checkpoint,
        quant=None if args.dense else checkpoint.quant or quant_config(args),
        lora=None if args.adapter is None else read_adapter_config(args.adapter),
        compute_dtype=DTYPES[dtype_name(args.dtype)],
        embedding_bits=args.embedding_bits,
    )
    if args.adapter is not None:
        load_adapter(args.adapter, model)
    config = config.with_eos(read_eos_token_ids(path))
    return model, checkpoint_tokenizer(checkpoint), config, jax.random.key(args.seed)
