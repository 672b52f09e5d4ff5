"""What `generate` and `chat` share: which model writes, and how it writes."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from qlora_jax.checkpoints import (
    Checkpoint,
    check_adapter,
    checkpoint_tokenizer,
    load_adapter,
    load_model,
    open_checkpoint,
)
from qlora_jax.checkpoints.adapter_tokenizer import adapter_tokenizer
from qlora_jax.checkpoints.checkpoint import DTYPES, dtype_name
from qlora_jax.cli.arguments import SOURCE_HELP, add_quant, count, quant_config, seed
from qlora_jax.data import Tokenizer
from qlora_jax.generate import (
    GenerationConfig,
    Generative,
    check_prompts,
    read_eos_token_ids,
)
from qlora_jax.models import family_of
from qlora_jax.quant import QuantConfig


def add_writing(parser: argparse.ArgumentParser) -> None:
    """The model, its adapter, and how it samples."""
    parser.add_argument("model", metavar="MODEL", help=SOURCE_HELP)
    parser.add_argument("--revision", help="branch, tag or commit, of a hub name")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="of a PEFT adapter")
    parser.add_argument("--dtype", default="bfloat16", help="of the computation")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=count, default=256)
    sampling.add_argument(
        "--temperature", type=float, default=0.7, help="0: the most likely token each time"
    )
    sampling.add_argument("--top-p", type=float, default=0.9)
    sampling.add_argument("--top-k", type=count)
    sampling.add_argument("--min-p", type=float, default=0.0)
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1: less is said twice",
    )
    sampling.add_argument("--seed", type=seed, default=0)
    parser.add_argument(
        "--16-bit", dest="dense", action="store_true", help="do not quantize the base"
    )
    add_quant(parser, "how a 16-bit base is quantized")
    parser.add_argument(
        "--embedding-bits", type=int, choices=[8, 4], help="embedding and head packed (16 bits)"
    )


def load_writer(
    args: argparse.Namespace, path: Path, prompts: Sequence[str] = (), stop: Sequence[str] = ()
) -> tuple[Any, Tokenizer, GenerationConfig, jax.Array]:
    """The model that lies at `path`, its tokenizer, how to sample, and the key of the samples.

    What is wrong with `prompts` and the rest is told before the model is read.
    """
    config = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop=stop,
    ).with_eos(read_eos_token_ids(path))
    checkpoint = open_checkpoint(path)
    family = family_of(checkpoint.config)
    if not issubclass(family.build, Generative):
        raise ValueError(f"{path} is a {family.model_type!r}, which writes no texts.")
    if args.adapter is None:
        tokenizer = checkpoint_tokenizer(checkpoint)
    else:
        tokenizer = adapter_tokenizer(args.adapter, checkpoint)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    check_prompts(ids, config, family.read_config(checkpoint.config))
    model = load_model(
        checkpoint,
        quant=_quant(args, checkpoint),
        lora=None if args.adapter is None else check_adapter(args.adapter),
        compute_dtype=DTYPES[dtype_name(args.dtype)],
        embedding_bits=args.embedding_bits,
    )
    if args.adapter is not None:
        load_adapter(args.adapter, model)
    return model, tokenizer, config, jax.random.key(args.seed)


def _quant(args: argparse.Namespace, checkpoint: Checkpoint) -> QuantConfig | None:
    """How the base is stored; ValueError where the options ask for what will not be."""
    asked, stored = quant_config(args), None if args.dense else checkpoint.quant
    if (args.dense or stored) and asked not in (QuantConfig(), stored):
        base = "--16-bit is given" if args.dense else f"{checkpoint.source} is stored as {stored}"
        raise ValueError(f"{base}, but other options ask for {asked}: leave them out.")
    return None if args.dense else stored or asked
