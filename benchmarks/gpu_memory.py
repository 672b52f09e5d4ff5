"""Is the plan right? A 65B-shaped QLoRA step with random NF4 weights under a memory limit.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.6 python -m benchmarks.gpu_memory --out memory.json
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.6 python -m benchmarks.gpu_memory --stream --out streamed.json

The fraction is of the card's memory: 0.6 of 80 GB is 48 GB. One variant per process, because an
allocator's peak never falls. Reported: the plan (compiled for the device that is here), the peak
that the allocator saw and the plan's error against it, tokens per second, and the bytes that cross
the bus in a step. `--toy` runs anywhere; a CPU counts no peak.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from benchmarks._report import machine, require_gpu
from qlora_jax.nn import LoraConfig
from qlora_jax.plan import Workload, find_config, measure, plan
from qlora_jax.train import TrainConfig

TOY = {
    "model_type": "llama",
    "vocab_size": 256,
    # A layer's codes are just large enough to stream.
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Plan the step, run it, write both down; 1 if it could not run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="llama-65b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--stream", action="store_true", help="the layers' weights on the host")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--toy", action="store_true", help="a tiny model, for any machine")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    if not options.toy:
        require_gpu(parser)
    work = Workload(
        find_config(TOY if options.toy else options.model),
        sequence=options.sequence,
        train=TrainConfig(
            micro_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulation,
            gradients_on_host=options.accumulation > 1,
        ),
        lora=LoraConfig(r=4 if options.toy else 64, dtype=jnp.bfloat16),
        stream_weights=options.stream,
    )
    planned = plan(work)
    total = planned.device.total
    result = {
        "meta": machine(),
        "model": "toy" if options.toy else options.model,
        "streamed": options.stream,
        "batch": [options.accumulation, options.batch, options.sequence],
        "limit": planned.memory,
        "planned": dataclasses.asdict(planned.device)
        | {"total": total, "host": planned.host, "traffic": planned.traffic.total},
    }
    try:
        found = measure(planned.work, steps=options.steps)
        result["measured"] = found._asdict()
        result["plan_error"] = None if not found.peak else total / found.peak - 1
    except Exception as error:  # a step that does not fit is an answer, too
        result["error"] = f"{type(error).__name__}: {error}"[:800]
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return int("error" in result)


if __name__ == "__main__":
    sys.exit(main())
