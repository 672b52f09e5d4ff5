"""`qlora-jax plan`: what a finetuning step needs on a card, before the card is rented."""

import argparse
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels.cards import CARDS, find_card
from pallas_kernels.compile_for import PLUGIN_HINT, gpu_compiler_available
from qlora_jax.cli import SUBCOMMANDS
from qlora_jax.models import REMAT, EncoderDecoderConfig
from qlora_jax.nn import LoraConfig
from qlora_jax.plan import (
    SHAPES,
    Report,
    Workload,
    check_plot,
    find_config,
    measure,
    plot,
    report,
    text,
)
from qlora_jax.plan.report import gib
from qlora_jax.quant import QuantConfig
from qlora_jax.train import OPTIMIZERS, TrainConfig


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """The subcommand's arguments."""
    parser = subparsers.add_parser(
        "plan",
        help=SUBCOMMANDS["plan"],
        description="Compiles the training step for cards that need not be here and prints its "
        "memory by component, what fits, and the largest batch and sequence that do.",
        epilog=f"Named shapes: {', '.join(SHAPES)}.",
    )
    parser.add_argument("models", nargs="+", help="a hub name, a folder, or a named shape")
    parser.add_argument(
        "--card", nargs="+", default=None, metavar="CARD", help=f"of {', '.join(CARDS)}"
    )
    parser.add_argument(
        "--batch", type=int, default=None, help="examples held at once, on all cards (one on each)"
    )
    parser.add_argument(
        "--devices", type=int, default=1, help="cards of one machine that share a batch (1)"
    )
    parser.add_argument(
        "--cut-weights", action="store_true", help="each card has its part of them, not all"
    )
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per update (1)")
    parser.add_argument("--sequence", type=int, default=512, help="tokens of an example (512)")
    parser.add_argument(
        "--target", type=int, default=None, help="tokens of an encoder–decoder's target (as many)"
    )
    parser.add_argument("--packed", action="store_true", help="rows of several examples")
    parser.add_argument("--rank", type=int, default=64, help="of the adapters (64)")
    parser.add_argument(
        "--lora-dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of adapters and gradients; bfloat16 keeps float32 copies in the optimizer's state",
    )
    parser.add_argument("--optim", default="adamw", choices=OPTIMIZERS, help="(adamw)")
    parser.add_argument("--lora-dropout", type=float, default=0.0)
    parser.add_argument("--quant", default="nf4", help="nf4, fp4, int4, int8, or none (nf4)")
    parser.add_argument("--no-double-quant", action="store_true")
    parser.add_argument(
        "--embedding-bits", type=int, choices=[8, 4], help="embedding and head packed (16 bits)"
    )
    parser.add_argument("--no-paged", action="store_true", help="Adam's moments on the device")
    parser.add_argument("--no-clip", action="store_true", help="no clipping by the global norm")
    parser.add_argument("--remat", default="full", choices=sorted(REMAT))
    parser.add_argument(
        "--mlp-tile", type=int, default=None, help="tokens that an MLP reads at once (all)"
    )
    parser.add_argument(
        "--stream-weights", action="store_true", help="layers' weights on the host, one at a time"
    )
    parser.add_argument(
        "--gradients-on-host", action="store_true", help="sums of accumulation on the host"
    )
    parser.add_argument(
        "--update-in-backward",
        action="store_true",
        help="each layer's update in the backward pass, without clipping by the global norm",
    )
    parser.add_argument("--attention", default=None, help="xla, cudnn, chunked (the card's best)")
    parser.add_argument("--matmul", default=None, help="xla, triton, mosaic_gpu (by dispatch)")
    parser.add_argument("--decode-batch", type=int, default=1, help="texts decoded at once (1)")
    parser.add_argument("--decode-length", type=int, default=2048, help="their tokens (2048)")
    parser.add_argument("--no-search", action="store_true", help="this one point only")
    parser.add_argument("--measure", action="store_true", help="run the step on the card here")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything there; - prints"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="stacked bars, PNG, SVG or PDF")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plans every model on every card."""
    # XLA's GPU plugin, loaded from here on, complains of its own estimates with large programs, in
    # lines that read like errors. "1" is what JAX sets where the user says nothing.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if args.card is not None and not args.measure and not os.environ.get("JAX_PLATFORMS"):
        # Nothing runs on an accelerator here, and JAX would look for one with that plugin.
        jax.config.update("jax_platforms", "cpu")
    _check(args)
    cards = [None] if args.card is None else [find_card(name) for name in args.card]
    reports: list[Report] = []
    for model in args.models:
        work = _workload(model, args)
        for card in cards:
            found = report(
                str(model),
                work,
                card,
                search=not args.no_search,
                decode_batch=args.decode_batch,
                decode_length=args.decode_length,
            )
            reports.append(found)
            if str(args.json) != "-":
                print(text([found]), end="\n\n", flush=True)
    if args.measure:
        _compare(reports[-1])
    _write(reports, args.json, args.plot)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses what is wrong before minutes of compiling."""
    if args.card is None and jax.default_backend() != "gpu":
        raise ValueError(
            f"this machine has no GPU: name one or more cards with --card, of {', '.join(CARDS)}."
        )
    if args.measure and jax.default_backend() != "gpu":
        raise ValueError("--measure runs the step on a GPU, and this machine has none.")
    if args.measure and args.devices > 1:
        raise ValueError(
            f"--measure runs on one card, and --devices is {args.devices}: leave one out."
        )
    for name in args.card or ():
        find_card(name)
    if args.card is not None and not gpu_compiler_available():
        raise ModuleNotFoundError(f"{PLUGIN_HINT} (140 MB, no driver needed).")
    for name in ("decode_batch", "decode_length", "devices"):
        if getattr(args, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is {getattr(args, name)}, but 1 or more is needed.")
    for option, file in (("--json", args.json), ("--plot", args.plot)):
        if file is not None and not file.parent.is_dir():
            raise FileNotFoundError(f"{option} is {file}, but there is no folder {file.parent}.")
        if file is not None and file.is_dir():
            raise ValueError(f"{option} is {file}, which is a folder: name a file.")
    if args.plot is not None:
        check_plot(args.plot)
    configs = [find_config(model) for model in args.models]
    if args.target is not None and not any(isinstance(c, EncoderDecoderConfig) for c in configs):
        raise ValueError(
            f"--target is {args.target}, but {', '.join(args.models)} reads one sequence: leave it "
            "out."
        )


def _write(reports: list[Report], json_file: Path | None, plot_file: Path | None) -> None:
    """Everything as JSON, where - is the standard output, and as bars."""
    if json_file is not None:
        written = json.dumps([item.as_dict() for item in reports], indent=1)
        if str(json_file) == "-":
            print(written)
        else:
            json_file.write_text(written + "\n", encoding="utf-8")
    if plot_file is not None:
        plot(reports, plot_file)
        print(f"wrote {plot_file}", file=sys.stderr)


def _workload(model: str, args: argparse.Namespace) -> Workload:
    quant = None
    if args.quant != "none":
        quant = QuantConfig(args.quant, double_quant=not args.no_double_quant)
    config = find_config(model)
    # Of several models on one command line, those that have a target take it.
    target = args.target if isinstance(config, EncoderDecoderConfig) else None
    return Workload(
        config,
        sequence=args.sequence,
        target=target,
        packed=args.packed,
        train=TrainConfig(
            micro_batch_size=args.devices if args.batch is None else args.batch,
            gradient_accumulation_steps=args.accumulation,
            paged=not args.no_paged,
            gradients_on_host=args.gradients_on_host,
            optim=args.optim,
            master_weights=args.lora_dtype != "float32",
            update_in_backward=args.update_in_backward,
            max_grad_norm=None if args.no_clip or args.update_in_backward else 0.3,
        ),
        lora=LoraConfig(
            r=args.rank, lora_dropout=args.lora_dropout, dtype=jnp.dtype(args.lora_dtype)
        ),
        quant=quant,
        embedding_bits=args.embedding_bits,
        remat=args.remat,
        stream_weights=args.stream_weights,
        mlp_tile=args.mlp_tile,
        attention=args.attention,
        matmul=args.matmul,
        devices=args.devices,
        cut_weights=args.cut_weights,
    )


def _compare(planned: Report) -> None:
    """The last plan beside what the allocator counts while the step runs."""
    found = measure(planned.plan.work)
    total = planned.plan.device.total
    print(f"{'':<12}{'planned':>10}{'measured':>10}  on {found.device}")
    print(f"{'device GiB':<12}{gib(total):>10}{gib(found.peak):>10}")
    if found.peak:
        print(f"the plan is {100 * (total / found.peak - 1):+.1f}% off")
    print(f"{found.seconds:.3f} s a step, {found.tokens_per_second:.0f} tokens/s")
