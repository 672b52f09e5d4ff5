"""The paper's sweeps by name: `python -m experiments.sweep --preset paper-table5`.

The hyperparameters of the paper's appendix B stand here once, as a table; a preset is the tree of a
sweep's file built from it (experiments/cells.py), so that every flag of a sweep changes it too.

| preset | what |
|---|---|
| paper-table5 | MMLU, 5-shot, after finetuning: 8 datasets × {7B, 13B, 33B, 65B} |
| paper-table4 | the same for {Alpaca, FLAN v2} under BF16, FP4 and NF4 with double quantization |

`scale="tiny"` keeps a sweep's datasets, loaders, prompts, loss masks, rules and report, and puts in
the place of what a laptop lacks: the embedded models (7B is stdlib-1m, 13B is stdlib-4m; the
repository has no third scale, so 33B and 65B are left out), a few steps of few short rows, and of
MMLU one validation question per subject, where the questions are at hand. Rows are real ones where
`rows` holds them in the files of `REAL_ROWS`, and else made from the embedded datasets, in the
schema of the original (experiments/embedded/paper_rows.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.embedded.paper_rows import write_rows
from experiments.tree import Tree

SCALES = ("7B", "13B", "33B", "65B")
DATASETS = (
    "self-instruct",
    "longform",
    "chip2",
    "hh-rlhf",
    "unnatural-instructions",
    "oasst1",
    "alpaca",
    "flan-v2",
)
"""In the order of the paper's Table 5."""

MODELS = {
    "7B": "huggyllama/llama-7b",
    "13B": "huggyllama/llama-13b",
    "33B": "huggyllama/llama-30b",
    "65B": "huggyllama/llama-65b",
}
"""LLaMA (1), which the paper finetunes."""

LLAMA_SHAPES = {
    # hidden, intermediate, layers, heads
    "huggyllama/llama-7b": (4096, 11008, 32, 32),
    "huggyllama/llama-13b": (5120, 13824, 40, 40),
    "huggyllama/llama-30b": (6656, 17920, 60, 52),
    "huggyllama/llama-65b": (8192, 22016, 80, 64),
}
"""So that a dry run needs no hub; their vocabulary has 32,000 entries."""


@dataclass(frozen=True)
class Hyperparameters:
    """One line of the table of appendix B.

    `source` and `target` are the lengths in tokens that prompts and answers are cut to; a source of
    None: a conversation, which is all target.
    """

    datasets: tuple[str, ...]
    scales: tuple[str, ...]
    batch: int
    learning_rate: float
    steps: int
    source: int | None
    target: int


_SMALL, _LARGE = ("7B", "13B"), ("33B", "65B")
_OTHERS = ("self-instruct", "chip2", "unnatural-instructions", "alpaca", "flan-v2")
HYPERPARAMETERS = (
    Hyperparameters(_OTHERS, _SMALL, 16, 2e-4, 10_000, 384, 128),
    Hyperparameters(_OTHERS, ("33B",), 32, 1e-4, 5_000, 384, 128),
    Hyperparameters(_OTHERS, ("65B",), 64, 1e-4, 2_500, 384, 128),
    Hyperparameters(("oasst1",), _SMALL, 16, 2e-4, 1_875, None, 512),
    Hyperparameters(("oasst1",), _LARGE, 16, 1e-4, 1_875, None, 512),
    Hyperparameters(("hh-rlhf",), _SMALL, 16, 2e-4, 10_000, None, 768),
    Hyperparameters(("hh-rlhf",), ("33B",), 32, 1e-4, 5_000, None, 768),
    Hyperparameters(("hh-rlhf",), ("65B",), 64, 1e-4, 2_500, None, 768),
    Hyperparameters(("longform",), _SMALL, 16, 2e-4, 4_000, 512, 1024),
    Hyperparameters(("longform",), _LARGE, 32, 1e-4, 2_343, 512, 1024),
)

DROPOUT = {"7B": 0.1, "13B": 0.1, "33B": 0.05, "65B": 0.05}

# What a 48 GB card holds at once; the rest of a batch is accumulated, which changes no update.
_MICRO_BATCH = {"7B": 4, "13B": 4, "33B": 1, "65B": 1}


def _rules() -> list[Tree]:
    """The table as a sweep's rules."""
    rules: list[Tree] = []
    for line in HYPERPARAMETERS:
        for scale in line.scales:
            micro = min(_MICRO_BATCH[scale], line.batch)
            options = {
                "data.source_max_len": line.source,
                "data.target_max_len": line.target,
                "train.learning_rate": line.learning_rate,
                "train.steps": line.steps,
                "train.micro_batch_size": micro,
                "train.gradient_accumulation_steps": line.batch // micro,
                "lora.lora_dropout": DROPOUT[scale],
            }
            when = {"dataset": list(line.datasets), "model": scale}
            rules.append({"when": when, "set": options})
    return rules


def _sweep(name: str, datasets: tuple[str, ...]) -> Tree:
    """What all sweeps over datasets × scales share; all else is the defaults, which are QLoRA's."""
    own: dict[str, Tree] = {
        # The hub has its held-out conversations as a split.
        "oasst1": {"validation_split": "test"},
        # Of the hub's 300 GB the chain-of-thought submixture and instructions without examples;
        # which of its more than 15 million rows the paper drew is not on record.
        "flan-v2": {"hub_files": ["cot_*_train.jsonl.gz", "niv2_zs_noopt_train.jsonl.gz"]},
    }
    return {
        "name": name,
        "models": {scale: {"source": source} for scale, source in MODELS.items()},
        "datasets": {name: {"source": name, **own.get(name, {})} for name in datasets},
        "lora": {"r": 64, "alpha": 16},
        "train": {"eval_every": 500, "save_every": 250},
        "mmlu": {"split": "test", "shots": 5, "every": 500},
        "rules": _rules(),
    }


def _table5() -> Tree:
    return _sweep("paper-table5", DATASETS)


def _table4() -> Tree:
    methods = {
        "BF16": {"quant": None},
        "FP4": {"quant": {"quant_type": "fp4", "double_quant": False}},
        "NF4+DQ": {"quant": {"quant_type": "nf4", "double_quant": True}},
    }
    return {**_sweep("paper-table4", ("alpaca", "flan-v2")), "axes": {"method": methods}}


PRESETS: dict[str, Callable[[], Tree]] = {"paper-table5": _table5, "paper-table4": _table4}
"""The sweeps by name."""

# --------------------------------------------------------------------------- tiny

REAL_ROWS = {
    "oasst1": "oasst_trees.jsonl",
    "hh-rlhf": "hh_rlhf.jsonl",
    "alpaca": "alpaca.json",
    "self-instruct": "self_instruct_prompt_completion.jsonl",
    "unnatural-instructions": "unnatural_instructions.jsonl",
    "flan-v2": "flan_v2_cot.jsonl",
    "longform": "longform_train.json",
}
"""Under which name a folder of real rows has each dataset; of Chip2 none could be had."""

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
ROWS, QUESTIONS = _BESIDE / "instruct", _BESIDE / "mmlu"
"""Where real rows and MMLU's questions lie on the machines of this project's authors."""

_TINY_MODELS = {"7B": "stdlib-1m", "13B": "stdlib-4m"}
_TINY: Tree = {
    # A CPU multiplies in float32; what is stored stays in the files' 16 bits.
    "model.compute_dtype": "float32",
    "model.param_dtype": "bfloat16",
    "model.remat": "none",
    # Two shapes for all datasets: conversations of 128 tokens, prompts and answers of 256.
    "data.buckets": [128, 256],
    "data.target_max_len": 128,
    "data.max_rows": 48,
    "data.validation_rows": 8,
    "data.validation_split": None,
    "data.hub_files": None,
    "lora.r": 8,
    "train.steps": 6,
    "train.micro_batch_size": 8,
    "train.gradient_accumulation_steps": 1,
    # Models of a million parameters need steps of another size than those of billions.
    "train.learning_rate": 5e-3,
    "train.eval_every": 3,
    "train.save_every": 0,
}


def preset(
    name: str,
    scale: str = "full",
    *,
    out: Path | None = None,
    rows: Path | None = None,
    questions: Path | None = None,
) -> Tree:
    """The sweep of that name, as the tree of its file.

    Args:
        name: a key of `PRESETS`.
        scale: "full", or "tiny" for this machine.
        out: of a tiny sweep, the folder that takes the rows which have to be made; None makes none
            (for a dry run).
        rows: of a tiny sweep, a folder of real rows (`REAL_ROWS`).
        questions: of a tiny sweep, a folder of MMLU's original files.

    Raises:
        ValueError: no such preset or scale.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}.")
    tree = PRESETS[name]()
    if scale == "full":
        return tree
    if scale != "tiny":
        raise ValueError(f"scale is {scale!r}, but should be full or tiny.")
    datasets = {
        dataset: {**section, "files": str(_tiny_file(dataset, out, rows))}
        for dataset, section in tree["datasets"].items()
    }
    mmlu = None
    if questions is not None and questions.is_dir():
        mmlu = {"source": str(questions), "split": "val", "shots": 5, "limit": 1}
    conversations = [d for line in HYPERPARAMETERS if line.source is None for d in line.datasets]
    prompts = [dataset for dataset in datasets if dataset not in conversations]
    return {
        **tree,
        "name": f"{name}-tiny",
        "models": {scale: {"source": source} for scale, source in _TINY_MODELS.items()},
        "datasets": datasets,
        "mmlu": mmlu,
        "rules": [
            *tree["rules"],
            {"when": {}, "set": _TINY},
            {"when": {"dataset": prompts}, "set": {"data.source_max_len": 128}},
        ],
    }


def _tiny_file(dataset: str, out: Path | None, rows: Path | None) -> Any:
    """The file with a dataset's rows: real ones, or made ones."""
    if rows is not None and dataset in REAL_ROWS and (rows / REAL_ROWS[dataset]).is_file():
        return rows / REAL_ROWS[dataset]
    made = (out or Path()) / "rows" / f"{dataset}.jsonl"
    if out is not None and not made.is_file():
        write_rows(dataset, made)
    return made
