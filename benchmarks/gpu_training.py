"""What does a QLoRA step of a whole model cost on this card: tokens per second, and peak bytes?

    python -m benchmarks.gpu_training --out benchmarks/results/h200 --budget 300
    python -m benchmarks.gpu_training --out benchmarks/results/2xrtx-4090 --devices 1 2 2-cut

A Llama-shaped model with random NF4 weights made on the device (no download), LoRA of rank 64 on
all linear layers, AdamW with its moments in pinned host memory, the project's own training step.
For each model × base × matmul implementation × batch: compile time, the compiler's own account of
memory, median seconds per step, tokens per second, and the peak that the allocator saw. The same
seed everywhere, so the first loss must agree between implementations: it is written down.

On several devices each takes the batch that is asked for, so that tokens per second would grow with
their number if nothing were exchanged; memory is that of one device, the one with the highest peak.

Cases run from small to large, because an allocator's peak never falls within a process; where a
case did not raise it, its peak is null. Results are written after every case: `training.json`,
`training.md`. `--toy` runs a tiny model anywhere.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks._files import put
from benchmarks._report import machine, require_gpu
from pallas_kernels._table import using_table
from qlora_jax.data.batches import Batch
from qlora_jax.evaluate import split_adapters
from qlora_jax.models import (
    Decoder,
    DecoderConfig,
    RopeConfig,
    attention_for,
    spread,
    spread_rows,
)
from qlora_jax.nn import LoraConfig
from qlora_jax.plan.measure import random_weights
from qlora_jax.quant import QuantConfig
from qlora_jax.train import TrainConfig, init_state, make_train_step

MODELS = {
    "llama-7b": DecoderConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
    ),
    "llama-3-8b": DecoderConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope=RopeConfig(rope_theta=500000.0),
    ),
    "toy": DecoderConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One training step to time."""

    model: str
    base: str
    """"nf4", or "bf16" for 16-bit LoRA: the memory and speed to compare with."""
    matmul: str | None
    """Implementation of the 4-bit matmuls; None lets the dispatch choose."""
    batch: int
    """Rows of a micro-batch on each device."""
    accumulation: int
    seq: int
    devices: int = 1
    cut: bool = False
    """Whether each device has its part of the weights, not all of them."""

    @property
    def tokens(self) -> int:
        """Tokens per optimizer update."""
        return self.devices * self.batch * self.accumulation * self.seq

    @property
    def label(self) -> str:
        """A short name for tables."""
        shape = f"{self.accumulation}x" * (self.accumulation > 1) + f"{self.batch}x{self.seq}"
        where = "" if self.place == "1" else f" on {self.place}"
        return f"{self.model} {self.base} {self.matmul or 'auto'} {shape}{where}"

    @property
    def place(self) -> str:
        """The devices, as `--devices` takes them."""
        return f"{self.devices}-cut" if self.cut else str(self.devices)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases asked for; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=300)
    parser.add_argument("--toy", action="store_true", help="a tiny model, for any machine")
    parser.add_argument("--models", nargs="+", default=["llama-7b"], choices=sorted(MODELS))
    parser.add_argument("--bases", nargs="+", default=["nf4", "bf16"], choices=["nf4", "bf16"])
    parser.add_argument(
        "--matmuls", nargs="+", default=["xla", "triton"], help="xla, triton, mosaic_gpu, auto"
    )
    parser.add_argument(
        "--batches",
        nargs="+",
        default=["1x512", "16x512", "4x1024"],
        help="BATCHxSEQ or ACCUMULATIONxBATCHxSEQ, small to large",
    )
    parser.add_argument(
        "--devices", nargs="+", default=["1"], help="how many; N-cut cuts the weights over them"
    )
    parser.add_argument(
        "--rules", type=Path, help="rules that go before the table's, as gpu_kernels writes them"
    )
    parser.add_argument("--attention", default="auto", choices=["auto", "xla", "cudnn"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args(argv)
    if options.rules and not options.rules.exists():
        parser.error(
            f"--rules is {options.rules}, which is not there: benchmarks.gpu_kernels makes it"
        )
    for place in options.devices:
        if not re.fullmatch(r"[1-9]\d*(-cut)?", place):
            parser.error(f"--devices names {place!r}, but numbers are needed, or N-cut")
    if not options.toy:
        require_gpu(parser)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.toy:
        options.models, options.batches, options.rank = ["toy"], ["1x32", "2x2x32"], 4
    with using_table(options.rules) if options.rules else contextlib.nullcontext():
        return measure(options)


def measure(options: argparse.Namespace) -> int:
    """Run the cases until the budget is spent, writing after each."""
    meta = machine() | {"attention": options.attention, "rules": str(options.rules or "")}
    results: dict[str, Any] = {"meta": meta, "cases": []}
    began, peak = time.monotonic(), 0
    for case in cases(options):
        left = options.budget - (time.monotonic() - began)
        if left < 10 and results["cases"]:
            print("budget spent", flush=True)
            break
        try:
            entry = run_case(case, options, peak)
        except Exception as error:  # one broken case must not cost the session the others
            entry = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:800]}
        peak = max(peak, entry.get("peak_bytes") or 0)
        results["cases"].append(_described(case) | entry)
        put(options.out / "training.json", json.dumps(results, indent=1))
        put(options.out / "training.md", markdown(results))
        print(case.label, json.dumps(entry), flush=True)
    return int(any(case["status"] != "ok" for case in results["cases"]))


def _described(case: Case) -> dict[str, Any]:
    return dataclasses.asdict(case) | {"label": case.label, "place": case.place}


def cases(options: argparse.Namespace) -> list[Case]:
    """Small batches first; per batch NF4 by every implementation, then the 16-bit base."""
    found = []
    for model in options.models:
        for base in options.bases:
            for batch in options.batches:
                sizes = [int(n) for n in batch.split("x")]
                accumulation, rows, seq = sizes if len(sizes) == 3 else (1, *sizes)
                matmuls = options.matmuls if base == "nf4" else ["xla"]
                for matmul, place in itertools.product(matmuls, options.devices):
                    name = None if matmul == "auto" else matmul
                    count, _, cut = place.partition("-")
                    where = int(count), cut == "cut"
                    found.append(Case(model, base, name, rows, accumulation, seq, *where))
    return found


def make_model(case: Case, attention: str, rank: int) -> tuple[nnx.GraphDef, Any, Any]:
    """(graphdef, adapters, frozen weights), all made on the device, none ever held in 16 bits.

    Rank 0 is no adapters. For several devices they are made on the first, and then dealt out.
    """
    config = MODELS[case.model]
    chosen = attention_for(jax.default_backend(), jnp.bfloat16, config.head_dim)
    if attention != "auto":
        chosen = "cudnn" if attention == "cudnn" else "xla"
    shapes = nnx.eval_shape(
        lambda: Decoder(
            config,
            quant=QuantConfig() if case.base == "nf4" else None,
            lora=LoraConfig(r=rank, dtype=jnp.float32) if rank else None,
            compute_dtype=jnp.bfloat16,
            attention=chosen,
            matmul=case.matmul if case.base == "nf4" else None,
            rngs=nnx.Rngs(0),
        )
    )
    graphdef, lora, frozen = split_adapters(shapes)
    lora, frozen = random_weights(lora), random_weights(frozen)
    if case.devices == 1:
        return graphdef, lora, frozen
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((case.devices,), ("data",), auto, devices=jax.devices()[: case.devices])
    model = nnx.merge(graphdef, lora, frozen)
    spread(model, mesh, over="data" if case.cut else None)
    return split_adapters(model)


def make_batch(case: Case, seed: int = 0) -> Batch:
    """Random tokens, every one of them trained on."""
    shape = (case.accumulation, case.devices * case.batch, case.seq)
    ids = np.random.default_rng(seed).integers(0, MODELS[case.model].vocab_size, shape)
    labels = ids.astype(np.int32)
    labels[..., 0] = -100
    return Batch(ids.astype(np.int32), labels, np.ones(shape, bool))


def run_case(case: Case, options: argparse.Namespace, earlier_peak: int) -> dict[str, Any]:
    """Compile, warm up, time."""
    graphdef, lora, frozen = make_model(case, options.attention, options.rank)
    settings = TrainConfig(paged=True, page_min_size=0 if options.toy else 100_000)
    optimizer = settings.optimizer()
    state = init_state(lora, optimizer, seed=0)
    step = make_train_step(graphdef, optimizer, state=state)
    batch = jax.device_put(spread_rows(make_batch(case), frozen, axis=1))
    began = time.perf_counter()
    compiled = step.lower(state, frozen, batch).compile()  # type: ignore[attr-defined]
    compile_s = time.perf_counter() - began
    memory = compiled.memory_analysis()
    losses, times = [], []
    for _ in range(options.steps + 2):
        began = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        losses.append(float(metrics.loss))
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[2:])
    stats = [device.memory_stats() or {} for device in jax.devices()[: case.devices]]
    peak = max(each.get("peak_bytes_in_use", 0) for each in stats)
    device_bytes = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return {
        "status": "ok" if np.isfinite(losses).all() else "failed",
        "error": None if np.isfinite(losses).all() else f"losses {losses}",
        "seconds": seconds,
        "spread": (max(times[2:]) - min(times[2:])) / seconds,
        "tokens_per_s": case.tokens / seconds,
        "compile_s": round(compile_s, 2),
        "planned_device_bytes": device_bytes,
        "planned_temp_bytes": memory.temp_size_in_bytes,
        "planned_host_bytes": memory.host_argument_size_in_bytes,
        "peak_bytes": peak if peak and peak > earlier_peak else None,
        "frozen_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(frozen)),
        "adapter_parameters": sum(leaf.size for leaf in jax.tree.leaves(state.lora)),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def markdown(results: dict[str, Any]) -> str:
    """The table of a run."""
    meta = results["meta"]
    lines = [
        f"# {meta['device']}: QLoRA training steps",
        "",
        f"jax {meta['jax']}, Python {meta['python']}, driver {meta['driver']}, {meta['date']}. "
        "Random weights, LoRA on all linears, paged AdamW, remat per layer; "
        "written by benchmarks/gpu_training.py.",
        "",
        "| model | base | matmul | on | batch "
        "| s/step | tokens/s | planned GiB | peak GiB | loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        batch = f"{case['accumulation']} · {case['batch']} × {case['seq']}"
        what = (case["model"], case["base"], case["matmul"] or "auto", case["place"], batch)
        head = f"| {' | '.join(what)} | "
        if case["status"] != "ok":
            lines.append(head + f"{case['status']}: {case['error'][:120]} | | | | |")
            continue
        peak = "" if case["peak_bytes"] is None else f"{case['peak_bytes'] / 2**30:.1f}"
        lines.append(
            head + f"{case['seconds']:.3f} | {case['tokens_per_s']:.0f} | "
            f"{case['planned_device_bytes'] / 2**30:.1f} | {peak} | {case['first_loss']:.4f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
