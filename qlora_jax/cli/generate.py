"""`qlora-jax generate`: a model continues texts."""

import argparse
import sys

from qlora_jax.cli import SUBCOMMANDS
from qlora_jax.cli.writing import add_writing, load_writer
from qlora_jax.generate import generate_text
from qlora_jax.pretrained import find_source


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """The subcommand's arguments."""
    parser = subparsers.add_parser(
        "generate",
        help=SUBCOMMANDS["generate"],
        description="Continues each prompt, as it is: no template is put around it (chat does "
        "that). One prompt is written as it comes, several one after another.",
        epilog="example: qlora-jax generate HuggingFaceTB/SmolLM2-135M 'The sea is' --top-p 0.95",
    )
    add_writing(parser)
    parser.add_argument("prompt", nargs="*", help="texts; none: standard input is one")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="repeatable")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the prompts and their continuations on standard output."""
    path = find_source(args.model, revision=args.revision)
    if not args.prompt and sys.stdin.isatty():
        print("The prompt, then Ctrl-D on a line of its own:", file=sys.stderr)
    prompts = args.prompt or [sys.stdin.read()]
    model, tokenizer, config, key = load_writer(args, path, prompts, args.stop)
    if len(prompts) == 1:
        # The prompt goes ahead of the first piece, and so is written only if it can be continued.
        ahead = iter(prompts)
        generate_text(
            model,
            tokenizer,
            prompts,
            config,
            key=key,
            batch_size=1,
            on_text=lambda _, piece: print(next(ahead, ""), piece, sep="", end="", flush=True),
            every=4,
        )
        print(next(ahead, ""))
        return 0
    size = min(8, len(prompts))
    answers = generate_text(model, tokenizer, prompts, config, key=key, batch_size=size)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"{prompt}{answer.text}\n")
    return 0
