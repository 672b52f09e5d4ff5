"""Finetune one model on one dataset through QLoRA.

With no arguments: configs/finetune.yaml, an embedded model on embedded data, about a minute on two
cores and without a network. Otherwise the defaults are the QLoRA paper's (NF4 with double
quantization, r=64 on every linear layer, Adam at a constant 2e-4, batches of 16), and a file or
flags say what differs:

    python -m experiments.finetune --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --data alpaca.json --set train.steps=200 --set lora.r=16

MODEL is an embedded model (stdlib-1m, stdlib-4m), a Hugging Face folder or a hub name.
DATA is an embedded dataset (describe, implement, chat), a .json/.jsonl/.csv/.parquet file, a folder
or a hub name. Its columns decide the prompt, unless data.format does; data.validation_split names
held-out rows, else data.validation_rows of them are held out.

A T5 (an encoder–decoder) reads what a prompt calls source and writes the target; its adapters have
the paper's alpha of 64 and rank of 16, or 64 from three billion weights on, unless you set others.

Every option is a dotted key: model.*, data.*, quant.*, lora.*, train.*, devices.*, mmlu.*, rouge.*
(--print-config lists them all, with their values). `--set quant=null` keeps the base in 16 bits:
plain LoRA. `--set mmlu={}` examines the finished model, `--set rouge={}` scores its answers.

On a machine with several devices, `--set devices.count=8` gives each its rows of every micro-batch;
with `devices.weights=cut` each also holds only its part of the weights. On several machines, start
the same command on each with --cluster, devices.count being those of all; the first process keeps
the run folder.

The run folder gets config.yaml, metrics.jsonl, checkpoints/, adapters/ (one a checkpoint, in PEFT's
format), adapter/ (the trained one) and result.json. The same command again resumes a run that was
killed, to the same bits; a finished run is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import traceback
from pathlib import Path

from rich.console import Console

from experiments.cells import LISTS
from experiments.checks import check, with_own_adapters
from experiments.cli import (
    CONFIGS,
    interrupted,
    join_cluster,
    keep_compiled_programs,
    make_console,
    read_settings,
    refuse,
    termination_interrupts,
    wandb_callbacks,
)
from experiments.config import RunConfig, build_run, named_source
from experiments.embedded import DATASETS, MODELS
from experiments.folders import delete_run
from experiments.report import ERROR, duration
from experiments.run import dated, execute, is_finished
from experiments.tree import read_yaml, to_yaml, with_setting
from qlora_jax.cli import in_one_sentence
from qlora_jax.cli.arguments import readable, seed
from qlora_jax.files import write_whole
from qlora_jax.models import STREAMABLE
from qlora_jax.processes import is_first, on_first
from qlora_jax.train import Callback
from qlora_jax.train.run_folder import locked_run_folder


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of options")
    parser.add_argument("--model", help="sets model.source")
    parser.add_argument("--data", help="sets data.source")
    parser.add_argument(
        "--stream-weights",
        action="store_true",
        help="sets model.stream_weights, and model.remat to full where it could not: for small "
        "cards",
    )
    parser.add_argument("--seed", type=seed, help="sets train.seed")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="set any option; repeatable, the last about an option counts",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="run folder (runs/finetune/MODEL-DATA-seedN)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete an earlier run in the run folder first"
    )
    parser.add_argument(
        "--cluster", nargs="?", const="", metavar="HOST:PORT/INDEX/COUNT",
        help="this is one of several processes of a run: JAX asks SLURM, Open MPI, Kubernetes or "
        "Cloud TPU which; elsewhere say where the first one listens, which this is (from 0), and "
        "how many there are",
    )  # fmt: skip
    parser.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases as well")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved options and stop"
    )
    return parser


def read_run(options: argparse.Namespace) -> RunConfig:
    """The run that the command line describes; ValueError or OSError where it describes none."""
    file = options.config
    if file is None and options.model is None and options.data is None:
        file = CONFIGS / "finetune.yaml"
    tree = {} if file is None else read_yaml(file)
    lists = [name for name in LISTS if name in tree]
    if lists:
        raise ValueError(
            f"{file} has {', '.join(lists)}, as a sweep's file: give it to "
            "python -m experiments.sweep, or leave them out."
        )
    for section, known in (("model", MODELS), ("data", DATASETS)):
        if section in tree:
            tree[section] = named_source(known, tree[section], f"{section} in {file}")
    if options.stream_weights and tree.get("model", {}).get("remat") not in STREAMABLE:
        tree = with_setting(tree, "model.remat", "full")
    flags = {
        "model.source": options.model,
        "model.stream_weights": options.stream_weights or None,
        "data.source": options.data,
        "train.seed": options.seed,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    for key, value in read_settings(options.set, given).items():
        tree = with_setting(tree, key, value)
    run = build_run(tree, str(file) if file else "the command line")
    return with_own_adapters(run, tree.get("lora") or {})


def default_folder(run: RunConfig) -> Path:
    """runs/finetune/MODEL-DATA-seedN: a file of rows without its ending, a model with all of its
    name's points, by which Qwen2.5-0.5B is another than Qwen2.5-7B."""
    data = re.sub(r"\.(jsonl?|csv|parquet|arrow)$", "", Path(run.data.source).name)
    model = Path(run.model.source).name
    return Path("runs") / "finetune" / f"{model}-{data}-seed{run.train.seed}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 finished, 2 refused, 130 interrupted."""
    options = make_parser().parse_args(arguments)
    if options.cluster is not None:
        try:
            join_cluster(options.cluster)  # JAX catches SIGTERM from here on, and we after it
        except (ValueError, RuntimeError) as error:
            return refuse(error)
        except KeyboardInterrupt:
            return interrupted()
    console = make_console() if is_first() else Console(quiet=True)
    with termination_interrupts(), contextlib.ExitStack() as stack:
        try:
            run = read_run(options)
            if options.print_config:
                console.print(to_yaml(run), end="", highlight=False, markup=False, soft_wrap=True)
                return 0
            folder = options.out or default_folder(run)
            wandb_callbacks(options.wandb, folder, run)  # refused before anything is deleted
            if options.overwrite:
                check(run)
                on_first(lambda: delete_run(folder))
            run = dated(run, folder)
            if on_first(lambda: is_finished(run, folder)):
                console.print(f"{folder} holds this run, finished; --overwrite repeats it.")
                return 0
            check(run)
            on_first(lambda: stack.enter_context(locked_run_folder(folder)))
        except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
            return refuse(error)
        except KeyboardInterrupt:
            return interrupted()
        return _train(run, folder, wandb_callbacks(options.wandb, folder, run), console)


def _train(run: RunConfig, folder: Path, callbacks: list[Callback], console: Console) -> int:
    """The run in its folder, which is held; returns the exit status."""
    keep_compiled_programs(folder.parent / ".jax-cache")
    labels = {"dataset": run.data.source, "model": run.model.source, "seed": str(run.train.seed)}
    console.print(f"{run.model.source} on {run.data.source}, in {folder}", highlight=False)
    try:
        result = execute(run, folder, labels=labels, callbacks=callbacks, console=console)
    except (FloatingPointError, ValueError, OSError, RuntimeError, MemoryError) as error:
        # What `fit` refuses (a folder of another run, say), a training that blew up, a full disk or
        # device.
        status = refuse(error)
        if is_first():
            with contextlib.suppress(OSError):
                text = f"{in_one_sentence(error)}\n\n{traceback.format_exc()}"
                write_whole(folder / ERROR, text)
                print(f"the traceback is in {folder / ERROR}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        return interrupted(folder)
    before, after = result["before"]["perplexity"], result["after"]["perplexity"]
    console.print(
        f"perplexity {before:.2f} → {after:.2f} in {duration(result['seconds'])}, base "
        f"{readable(result['base_bytes'])}, adapter of {result['adapter_parameters']:,} parameters "
        f"in {folder / 'adapter'}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
