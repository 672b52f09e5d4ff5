"""How fast does a whole model write on this card: tokens per second, and milliseconds a token?

    python -m benchmarks.gpu_decode --out benchmarks/results/h200 --budget 300

A Llama-shaped model with random weights made on the device, read from a prompt and written on by
the project's own `generate` programs: a loop on the device, greedy, that no end token ends early.
For each batch: the NF4 base by itself, with an adapter added after each product, with one added
inside the kernels (`fuse_lora`), and the 16-bit base. Beside the time of a token stands what it
takes to read the weights once at the rate of a large copy of the same run: below that it cannot be.

Results are written after every case: `decode.json`, `decode.md`. `--toy` runs a tiny model
anywhere.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import gpu_training
from benchmarks._files import put
from benchmarks._report import machine, require_gpu
from benchmarks.gpu_kernels import ceilings
from benchmarks.gpu_training import MODELS, make_model
from pallas_kernels._table import TABLE, using_table
from qlora_jax.generate import GenerationConfig
from qlora_jax.generate.decode import advance, start

ADAPTERS = ("none", "after", "inside")


@dataclasses.dataclass(frozen=True)
class Case:
    """One model to write with."""

    model: str
    base: str
    """"nf4", or "bf16"."""
    matmul: str | None
    """Implementation of the 4-bit matmuls; None lets the dispatch choose."""
    adapter: str
    """"none", or where its product is added: "after" the base's, or "inside" its kernel."""
    batch: int

    @property
    def label(self) -> str:
        """A short name for tables."""
        return f"{self.model} {self.base} {self.matmul or 'auto'} {self.adapter} x{self.batch}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases asked for; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=300)
    parser.add_argument("--toy", action="store_true", help="a tiny model, for any machine")
    parser.add_argument("--model", default="llama-7b", choices=sorted(MODELS))
    parser.add_argument("--matmuls", nargs="+", default=["auto"], help="auto, xla, triton, …")
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=ADAPTERS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens that are read")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that are written")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument(
        "--rules", type=Path, help="rules that go before the table's, as gpu_kernels writes them"
    )
    options = parser.parse_args(argv)
    if not options.toy:
        require_gpu(parser)
    if options.toy:
        options.model, options.batches, options.rank = "toy", [1, 3], 4
        options.prompt, options.tokens = 8, 4
    options.out.mkdir(parents=True, exist_ok=True)
    return measure(options)


def cases(options: argparse.Namespace) -> list[Case]:
    """By batch: NF4 by every implementation and with every adapter, then the 16-bit base."""
    found = []
    for batch in options.batches:
        for matmul, adapter in itertools.product(options.matmuls, options.adapters):
            name = None if matmul == "auto" else matmul
            found.append(Case(options.model, "nf4", name, adapter, batch))
        found.append(Case(options.model, "bf16", "xla", "none", batch))
    return found


def measure(options: argparse.Namespace) -> int:
    """Run the cases until the budget is spent, writing after each."""
    limits = ceilings(toy=options.toy)
    results: dict[str, Any] = {
        "meta": machine() | {"prompt": options.prompt, "tokens": options.tokens},
        "ceilings": limits,
        "cases": [],
    }
    began = time.monotonic()
    for case in cases(options):
        if options.budget - (time.monotonic() - began) < 10 and results["cases"]:
            print("budget spent", flush=True)
            break
        try:
            with _rules_for(case, options.rules):
                entry = run_case(case, options, limits["copy_bytes_per_s"])
        except Exception as error:  # one broken case must not cost the session the others
            entry = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:800]}
        results["cases"].append(dataclasses.asdict(case) | {"label": case.label} | entry)
        put(options.out / "decode.json", json.dumps(results, indent=1) + "\n")
        put(options.out / "decode.md", markdown(results))
        print(case.label, json.dumps(entry), flush=True)
    return int(any(case["status"] != "ok" for case in results["cases"]))


@contextlib.contextmanager
def _rules_for(case: Case, first: Path | None) -> Iterator[None]:
    """The rules of the table, and before them those of a file, told where to add an adapter."""
    rules = [rule for path in (first, TABLE) if path for rule in json.loads(path.read_text())]
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "rules.json"
        inside = {"fuse_lora": case.adapter == "inside"}
        told.write_text(json.dumps([rule | inside for rule in rules]))
        # What was traced under other rules would be taken for these.
        jax.clear_caches()
        with using_table(told):
            yield


def run_case(case: Case, options: argparse.Namespace, copy_bytes_per_s: float) -> dict[str, Any]:
    """Compile, warm up, time the prompt and what is written."""
    rank = 0 if case.adapter == "none" else options.rank
    trained = gpu_training.Case(case.model, case.base, case.matmul, case.batch, 1, options.prompt)
    graphdef, *states = make_model(trained, "auto", rank)
    state = nnx.merge_state(*states)
    config = GenerationConfig(max_new_tokens=options.tokens)
    shape = (case.batch, options.prompt)
    ids = np.random.default_rng(0).integers(0, MODELS[case.model].vocab_size, shape)
    inputs = (
        jnp.asarray(ids, jnp.int32),
        jnp.ones(shape, bool),
        jax.random.split(jax.random.key(0), case.batch),
        jnp.zeros(case.batch, bool),
    )
    length = options.prompt + options.tokens
    reading, writing = [], []
    for _ in range(options.repeats + 1):
        began = time.perf_counter()
        written = start(graphdef, state, *inputs, config=config, cache_length=length)
        jax.block_until_ready(written.tokens)
        reading.append(time.perf_counter() - began)
        began = time.perf_counter()
        written = advance(graphdef, state, written, jnp.int32(options.tokens), config=config)
        jax.block_until_ready(written.tokens)
        writing.append((time.perf_counter() - began) / (options.tokens - 1))
    assert written.length.min() == options.tokens
    seconds = statistics.median(writing[1:])
    # Of the embedding only the tokens' rows are read.
    leaves = jax.tree_util.tree_leaves_with_path(state)
    weights = sum(x.nbytes for path, x in leaves if "embed" not in jax.tree_util.keystr(path))
    return {
        "status": "ok",
        "error": None,
        "seconds_per_token": seconds,
        "spread": (max(writing[1:]) - min(writing[1:])) / seconds,
        "tokens_per_s": case.batch / seconds,
        "prompt_seconds": statistics.median(reading[1:]),
        "first_run_s": round(reading[0] + writing[0] * (options.tokens - 1), 2),
        "weight_bytes": weights,
        "read_once_seconds": weights / copy_bytes_per_s,
    }


def markdown(results: dict[str, Any]) -> str:
    """The table of a run."""
    meta = results["meta"]
    lines = [
        f"# {meta['device']}: writing token after token",
        "",
        f"jax {meta['jax']}, Python {meta['python']}, driver {meta['driver']}, {meta['date']}. "
        f"Random weights, a prompt of {meta['prompt']} tokens, {meta['tokens']} written; "
        "written by benchmarks/gpu_decode.py.",
        "",
        "| model | base | matmul | adapter | rows | ms/token | tokens/s | weights read once, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        what = (case["model"], case["base"], case["matmul"] or "auto", case["adapter"])
        head = f"| {' | '.join(what)} | {case['batch']} | "
        if case["status"] != "ok":
            lines.append(head + f"{case['status']}: {case['error'][:120]} | | |")
            continue
        lines.append(
            head + f"{case['seconds_per_token'] * 1e3:.2f} | {case['tokens_per_s']:.0f} | "
            f"{case['read_once_seconds'] * 1e3:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
