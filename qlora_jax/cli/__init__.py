"""Floor 6: `qlora-jax`, what the library does to files, from a shell.

One module per subcommand, imported only when it is called, so that `--help` is instant. A module
has `add_parser(subparsers)`, which describes its arguments and sets `run` as the default of that
name, and `run(args) -> int`, the exit code.

Whatever is wrong with the input is one sentence on standard error and exit code 2; nothing is
written then. Ctrl-C ends a command with 130, as a shell's own.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

SUBCOMMANDS = {
    "chat": "talk with a model on the terminal",
    "generate": "a model continues texts",
    "inspect": "print a model's tensors: shapes, bits per weight, bytes",
    "quantize": "a 16-bit model into a bitsandbytes 4-bit folder",
    "merge": "an adapter into its base, with a report of what changed",
    "export": "a model or an adapter into safetensors, GGUF or PEFT's format",
    "plan": "the memory of a finetuning step on a card that need not be here",
    "push": "an adapter or a model onto the hub, with a model card",
}
"""Name, which is the module's too → one line for `qlora-jax --help`."""


def in_one_sentence(error: Exception) -> str:
    """What is wrong, on one line; of the operating system's errors what it met, and where."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, OSError) and error.filename and str(error.filename) not in text:
        text = f"{error.filename}: {text}"
    if isinstance(error, MemoryError):
        text = f"this machine has too little memory for that. {text}"
    return " ".join(text.split())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit code.

    Args:
        argv: the arguments; None takes the program's own.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="qlora-jax",
        description="QLoRA models as files: look at them, quantize, merge, convert, publish.",
        epilog="qlora-jax COMMAND --help tells more. Training: python -m experiments.finetune.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in SUBCOMMANDS.items():
        if argv[:1] == [name]:
            importlib.import_module(f"{__name__}.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    args, words = parser.parse_known_args(argv)
    ended = words[:1] == ["--"]
    plain = ended or not any(word.startswith("-") for word in words)
    if words and hasattr(args, "prompt") and plain:
        # argparse gives a `*` that options stand before no words, and leaves them over.
        args.prompt += words[ended:]
    elif words:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    try:
        return args.run(args)
    except (ValueError, OSError, ModuleNotFoundError, MemoryError) as error:
        print(f"qlora-jax {args.command}: {in_one_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
