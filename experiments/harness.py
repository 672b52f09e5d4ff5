"""Tasks of lm-evaluation-harness on a model, with or without an adapter (extra `eval`).

    python -m experiments.harness MODEL --tasks arc_easy hellaswag --limit 100
    python -m experiments.harness MODEL --adapter runs/x/adapter --tasks FOLDER/my_task.yaml

Task names are the harness's; it fetches their data from the hub. A path to a task's YAML file, or
a folder of them in --include, adds tasks of your own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from yaml import YAMLError

from experiments.answering import adapter_digest
from experiments.cli import (
    COMPUTE_DTYPES,
    QUANT_HELP,
    keep_compiled_programs,
    read_quant,
    run_command,
)
from experiments.rows import decoder_context, find_model
from qlora_jax.checkpoints import check_adapter, load_adapter
from qlora_jax.cli.arguments import count
from qlora_jax.data import load_chat_template
from qlora_jax.evaluate import Harness
from qlora_jax.files import write_whole
from qlora_jax.pretrained import load_pretrained


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.harness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="embedded model, folder or hub name")
    add("--tasks", nargs="+", required=True, metavar="TASK", help="names, or YAML files")
    add("--adapter", type=Path, metavar="FOLDER", help="a PEFT adapter for it")
    add("--quant", help=QUANT_HELP)
    add("--compute-dtype", choices=COMPUTE_DTYPES, default="bfloat16", help="of activations")
    add("--shots", type=int, metavar="N", help="solved examples shown (the task's own)")
    add("--limit", type=int, metavar="N", help="only so many examples of each task")
    add("--max-len", type=count, default=2048, metavar="N", help="tokens read at once (2048)")
    add("--batch-size", type=count, default=8, metavar="N", help="requests at once (8)")
    add("--chat-template", action="store_true", help="ask by the model's own chat template")
    add("--include", type=Path, metavar="FOLDER", help="a folder of further tasks")
    add("--out", type=Path, metavar="FOLDER", help="(runs/harness/MODEL or MODEL-DIGEST)")
    return parser


def run(options: argparse.Namespace, console: Console) -> int:
    """Asks the tasks and writes OUT/harness.json."""
    tasks = _known_tasks(options)  # before a model is read
    import lm_eval

    folder = find_model(options.model)
    context = decoder_context(folder)
    quant = read_quant(options.quant, folder)
    lora = None if options.adapter is None else check_adapter(options.adapter)
    adapter = None if options.adapter is None else adapter_digest(options.adapter)
    # Of several adapters of one model each keeps its results.
    name = Path(options.model).name + ("" if adapter is None else f"-{adapter[:8]}")
    out = options.out or Path("runs") / "harness" / name
    keep_compiled_programs(out.parent / ".jax-cache")
    dtype = jnp.dtype(options.compute_dtype)
    model, tokenizer = load_pretrained(folder, quant=quant, lora=lora, compute_dtype=dtype)
    if options.adapter is not None:
        load_adapter(options.adapter, model)
    out.mkdir(parents=True, exist_ok=True)
    harness = Harness(
        model,
        tokenizer,
        max_len=min(options.max_len, context),
        batch_size=options.batch_size,
        chat_template=load_chat_template(folder) if options.chat_template else None,
    )
    found = lm_eval.simple_evaluate(
        harness.lm(),
        tasks=options.tasks,
        num_fewshot=options.shots,
        limit=options.limit,
        apply_chat_template=options.chat_template,
        task_manager=tasks,
        log_samples=False,
    )
    results = found["results"]
    console.print(_table(results, f"{options.model}: lm-eval {lm_eval.__version__}"))
    told = {
        "model": options.model,
        "quant": "none" if quant is None else quant.quant_type,
        "adapter": adapter,
        "compute_dtype": options.compute_dtype,
        "shots": options.shots,
        "limit": options.limit,
        "max_len": harness.max_len,
        "chat_template": options.chat_template,
        "lm_eval": lm_eval.__version__,
        "results": results,
    }
    write_whole(out / "harness.json", json.dumps(told, indent=1, default=str) + "\n")
    console.print(str(out / "harness.json"), highlight=False)
    return 0


def _known_tasks(options: argparse.Namespace) -> Any:
    """The harness's tasks, among them those that are asked for.

    Raises:
        ValueError: the harness is not installed, or has no such task.
        FileNotFoundError: there is no such folder of further tasks.
    """
    try:
        import lm_eval.tasks
    except ModuleNotFoundError as error:
        raise ValueError(
            "the evaluation harness is not installed: pip install 'qlora-jax[eval]'."
        ) from error
    for name, value, least in (("--limit", options.limit, 1), ("--shots", options.shots, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}, but {least} or more is needed.")
    include = None if options.include is None else str(options.include)
    if include is not None and not options.include.is_dir():
        raise FileNotFoundError(f"--include is {include}, but there is no such folder.")
    tasks = lm_eval.tasks.TaskManager(include_path=include)
    try:
        # By the name that it has in older versions of lm-eval, or in newer.
        (getattr(tasks, "load", None) or tasks.load_task_or_group)(options.tasks)
    except (KeyError, TypeError, YAMLError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise ValueError(
            f"--tasks {' '.join(options.tasks)}: {reason}. Give names that `lm-eval ls tasks` "
            "lists, tasks of --include, or YAML files."
        ) from error
    return tasks


def _table(results: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Each task's scores, and their standard errors."""
    table = Table(title=title, title_justify="left")
    for name in ("task", "metric", "value", "±"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                deviation = metrics.get(f"{metric}_stderr,{filtered}")
                shown = f"{deviation:.4f}" if isinstance(deviation, float) else ""
                table.add_row(task, metric, f"{value:.4f}", shown)
    return table


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 2 refused."""
    return run_command(make_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
