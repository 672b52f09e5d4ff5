"""`qlora-jax inspect`: a model's tensors, from the headers of its files alone."""

import argparse

from qlora_jax.checkpoints import WeightFolder
from qlora_jax.cli import SUBCOMMANDS


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """The subcommand's arguments."""
    parser = subparsers.add_parser(
        "inspect",
        help=SUBCOMMANDS["inspect"],
        description="Prints the tensors of a model without reading their numbers.",
    )
    parser.add_argument("source", help="a model folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the tree."""
    weights = WeightFolder(args.source)
    for name in weights:
        print(f"{name}  {list(weights.shapes[name])}  {weights.dtypes[name]}")
    return 0
