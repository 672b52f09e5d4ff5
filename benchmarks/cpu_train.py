"""A QLoRA training step on the CPU, beside bitsandbytes + PEFT: same shapes, data and threads.

A 58.5M-parameter Llama (hidden 512, 8 layers, vocabulary 32,000) with random weights in NF4 with
double quantization, LoRA of rank 64 on all linear layers, AdamW, batch 4 × 256. Each program runs
in a process of its own, so that its peak memory can be told; they take a step in turn, and the
result is the ratio of the medians: single rounds differ by a third.

    python -m benchmarks.cpu_train                          # this project alone
    pip install torch==2.13.0 bitsandbytes peft transformers && python -m benchmarks.cpu_train
    python -m benchmarks.cpu_train --dtype bfloat16

Prints one JSON line: tokens per second and peak resident memory of each, and their ratios (tokens
above 1, memory below 1: better than the peer).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
RANK, ALPHA, LEARNING_RATE, MAX_GRAD_NORM = 64, 16, 2e-4, 0.3


def batch(size: tuple[int, int]) -> np.ndarray:
    """The same random token ids for both programs."""
    return np.random.default_rng(0).integers(0, SHAPE["vocab_size"], size, dtype=np.int32)


def ours(size: tuple[int, int], dtype: str, remat: str) -> Callable[[], float]:
    """One training step of this project, which returns its loss."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import qlora_jax as ql
    from qlora_jax.data import Batch
    from qlora_jax.evaluate import split_adapters
    from qlora_jax.models import Decoder, DecoderConfig
    from qlora_jax.train import init_state, make_train_step

    model = Decoder(
        DecoderConfig(**SHAPE, head_dim=64),
        quant=ql.QuantConfig(),
        lora=ql.LoraConfig(r=RANK, alpha=ALPHA),
        compute_dtype=jnp.dtype(dtype),
        remat=remat,
        rngs=nnx.Rngs(0),
    )
    graphdef, lora, frozen = split_adapters(model)
    tx = optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adamw(LEARNING_RATE, b2=0.999))
    state = init_state(lora, tx, seed=0)
    step = make_train_step(graphdef, tx, state=state)
    ids = jnp.asarray(batch(size))[None]
    inputs = Batch(ids, ids, jnp.ones_like(ids))

    def run() -> float:
        nonlocal state
        state, metrics = step(state, frozen, inputs)
        return float(jax.block_until_ready(metrics).loss)

    return run


def peer(size: tuple[int, int], dtype: str, remat: str) -> Callable[[], float]:
    """One training step of bitsandbytes + PEFT, which returns its loss."""
    import peft
    import torch
    import transformers
    from bitsandbytes import nn as bnb

    torch.set_num_threads(threads())
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    for parent in [module for name, module in model.named_modules() if "layers." in name]:
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                linear = bnb.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=getattr(torch, dtype),
                    quant_type="nf4",
                )
                linear.load_state_dict(child.state_dict())
                setattr(parent, name, linear.to("cpu"))
    model.requires_grad_(False)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    )
    if remat == "full":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0)
    ids = torch.from_numpy(batch(size)).long()

    def run() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


PROGRAMS = {"ours": ours, "bitsandbytes + PEFT": peer}


def threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def work(name: str, size: tuple[int, int], dtype: str, remat: str) -> None:
    """The child process: takes a step for each line on its standard input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    try:
        run = PROGRAMS[name](size, dtype, remat)
    except ImportError as error:
        answers.write(json.dumps({"missing": str(error)}) + "\n")
        return
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = run()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answers.write(json.dumps({"seconds": seconds, "loss": loss, "peak_bytes": peak}) + "\n")


def ask(child: subprocess.Popen) -> dict:
    """One step of a child process."""
    try:
        child.stdin.write("step\n")
        child.stdin.flush()
    except BrokenPipeError:
        pass  # it had nothing to run, and has said so
    return json.loads(child.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--remat", default="none", help="none, or full (gradient checkpointing)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = (options.batch, options.sequence)
    if options.program:
        work(options.program, size, options.dtype, options.remat)
        return
    arguments = [sys.executable, "-m", "benchmarks.cpu_train", *sys.argv[1:], "--program"]
    children = {
        name: subprocess.Popen(
            [*arguments, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name in PROGRAMS
    }
    first = {name: ask(child) for name, child in children.items()}  # compiles, warms caches
    running = [name for name, answer in first.items() if "missing" not in answer]
    steps: dict[str, list[dict]] = {name: [] for name in running}
    for _ in range(options.rounds):
        for name in running:
            steps[name].append(ask(children[name]))
    for child in children.values():
        child.stdin.close()
        child.wait()
    tokens = {
        name: options.batch * options.sequence / statistics.median(s["seconds"] for s in taken)
        for name, taken in steps.items()
    }
    memory = {name: taken[-1]["peak_bytes"] / 2**30 for name, taken in steps.items()}
    line = {
        "benchmark": "cpu_train",
        "dtype": options.dtype,
        "remat": options.remat,
        "batch": size,
        "threads": threads(),
        "tokens/s": {name: round(rate, 1) for name, rate in tokens.items()},
        "peak GiB": {name: round(gib, 2) for name, gib in memory.items()},
        "first loss": {name: round(first[name]["loss"], 3) for name in running},
    }
    if len(running) == 2:
        line["ratio tokens/s"] = round(tokens["ours"] / tokens["bitsandbytes + PEFT"], 2)
        line["ratio memory"] = round(memory["ours"] / memory["bitsandbytes + PEFT"], 2)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
