"""`qlora-jax push`: an adapter or a model onto the hub, with a model card."""

import argparse
from pathlib import Path

from qlora_jax.checkpoints.card import CARD, model_card, read_facts
from qlora_jax.checkpoints.hub import check_publishable, push
from qlora_jax.cli import SUBCOMMANDS


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """The subcommand's arguments."""
    parser = subparsers.add_parser(
        "push",
        help=SUBCOMMANDS["push"],
        description="Uploads the folder of an adapter or a model. Where it has no README.md, one "
        "is written from what its files and the run folder around it tell: base, data, "
        "hyperparameters, results, environment. Only safetensors, GGUF, JSON and tokenizer files "
        "go up, never pickles.",
        epilog="example: qlora-jax push runs/x/adapter my-name/my-adapter --private",
    )
    parser.add_argument("folder", metavar="FOLDER", help="of an adapter or a model")
    parser.add_argument("name", metavar="NAME", help="org/name on the hub, made if missing")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to commit to, made if missing")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--license", help="for the card, such as apache-2.0")
    parser.add_argument("--dry-run", action="store_true", help="print the card and upload nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Uploads, or prints the card."""
    folder = Path(args.folder)
    check_publishable(folder, args.name)
    facts = read_facts(folder) | ({"license": args.license} if args.license else {})
    if args.dry_run:
        given = folder / CARD
        print(
            given.read_text(encoding="utf-8") if given.is_file() else model_card(args.name, facts),
            end="",
        )
        return 0
    url = push(
        folder,
        args.name,
        private=args.private,
        revision=args.revision,
        message=args.message,
        facts=facts,
    )
    print(url)
    return 0
