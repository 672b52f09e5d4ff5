"""`qlora-jax chat`: a conversation with a model, turn by turn on the terminal."""

import argparse
import contextlib
import sys
from pathlib import Path

import jax

from qlora_jax.checkpoints.adapter_tokenizer import has_tokenizer
from qlora_jax.cli import SUBCOMMANDS
from qlora_jax.cli.writing import add_writing, load_writer
from qlora_jax.data import ChatTemplate, load_chat_template
from qlora_jax.generate import chat, newest_turns, prompt_room
from qlora_jax.generate.text import Message
from qlora_jax.pretrained import find_source


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """The subcommand's arguments."""
    parser = subparsers.add_parser(
        "chat",
        help=SUBCOMMANDS["chat"],
        description="Each line is a turn; an empty line, or the end of the input, ends the "
        "conversation. Turns are written by the model's own chat template, or the adapter's; the "
        "oldest are forgotten where the model's positions end.",
        epilog="example: qlora-jax chat HuggingFaceTB/SmolLM2-135M-Instruct --adapter x/adapter",
    )
    add_writing(parser)
    parser.add_argument("--system", metavar="TEXT", help="what stands before the first turn")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Reads turns from standard input and answers on standard output."""
    # Before a large model is read.
    path = find_source(args.model, revision=args.revision)
    if not path.is_dir():
        raise ValueError(
            f"{path} is one file, and its conversations have no template that is read here: give a "
            "model folder, or continue texts with qlora-jax generate."
        )
    try:
        template = _template(path, args.adapter)
    except ValueError as error:
        raise ValueError(f"{error} Without one, qlora-jax generate continues texts.") from error
    model, tokenizer, config, key = load_writer(args, path)
    room = prompt_room(getattr(model, "config", None), config)
    messages: list[Message] = []
    if args.system is not None:
        messages.append({"role": "system", "content": args.system})
    while True:
        print("> ", end="", flush=True)
        turn = sys.stdin.readline().strip()
        if not turn:
            print()
            return 0
        messages.append({"role": "user", "content": turn})
        kept, tokens = newest_turns(tokenizer, messages, template, room)
        if room is not None and tokens > room:
            messages.pop()
            _tell(
                f"That makes a prompt of {tokens} tokens, but the model's positions have room for "
                f"{room} beside --max-new-tokens {config.max_new_tokens}: write less."
            )
            continue
        if kept != messages:
            _tell(
                "The conversation has outgrown the model's positions: its oldest "
                f"{len(messages) - len(kept)} messages are forgotten."
            )
            messages = kept
        key, own = jax.random.split(key)
        answer = chat(
            model,
            tokenizer,
            messages,
            template,
            config,
            key=own,
            on_text=lambda piece: print(piece, end="", flush=True),
        )
        print()
        messages.append({"role": "assistant", "content": answer})


def _template(model: Path, adapter: Path | None) -> ChatTemplate:
    """The one beside an adapter's own tokenizer, where that has one, else the model's."""
    if adapter is not None and has_tokenizer(adapter):
        with contextlib.suppress(ValueError):
            return load_chat_template(adapter)
    return load_chat_template(model)


def _tell(text: str) -> None:
    """What the program says, which is no answer of the model's."""
    print(text, file=sys.stderr, flush=True)
