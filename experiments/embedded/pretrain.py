"""Train the embedded Llamas on the frozen corpus, from nothing, with this project's own decoder.

    python -m experiments.embedded.pretrain --attention cudnn     # both scales: minutes on a GPU
    python -m experiments.embedded.pretrain stdlib-1m --minutes 15 --batch 16 --sequence 256
                                                                  # the small one on two CPU cores

Full training of every weight: `Decoder` with `quant=None` keeps its weights dense, and `unfreeze`
makes them trainable. What makes it fast is that nothing crosses to the device but numbers: the
corpus is one array of token ids there, a batch is a gather at random offsets, and `CHUNK` steps are
one `lax.scan` in one jitted call.

The corpus is small (2.4M tokens), so a model sees it many times, and what keeps it from learning
it by heart is a schedule that ends in time and a strong weight decay. How much of both a scale
wants is tried: every combination of `--epochs` and `--weight-decay` is a run (linear warm-up, then
cosine to nothing), and the weights with the lowest held-out loss are kept. With `--minutes` there
is one run, whose length is found by timing its first chunks (all of them warm-up).

Each model is written as a Hugging Face folder in bfloat16: config.json, model.safetensors,
tokenizer.json, tokenizer_config.json, and training.json with what was run and what came out.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.embedded import MODELS, ROOT
from experiments.embedded.make_corpus import SPECIAL_TOKENS, read_corpus
from qlora_jax.checkpoints import save_model
from qlora_jax.cli.arguments import count
from qlora_jax.models import AttentionName, Decoder, DecoderConfig, unfreeze
from qlora_jax.models.loss import cross_entropy
from qlora_jax.optim import decay_mask

CHUNK = 50
EVAL_BATCH = 16
WARMUP_STEPS = 100


@dataclass(frozen=True)
class Scale:
    """A model's shape and the learning rate it likes."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    key_heads: int
    learning_rate: float


SCALES = {
    "stdlib-1m": Scale(hidden=128, mlp=320, layers=4, heads=4, key_heads=2, learning_rate=4e-3),
    "stdlib-4m": Scale(hidden=256, mlp=640, layers=5, heads=8, key_heads=4, learning_rate=2.5e-3),
}


class Plan(NamedTuple):
    """What is tried: how long, and how strongly weights are pulled to zero."""

    steps: int
    weight_decay: float


def decoder_config(scale: Scale, vocab_size: int) -> DecoderConfig:
    """The decoder of a scale: heads of 32, grouped-query attention, a tied head."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=scale.hidden,
        intermediate_size=scale.mlp,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.key_heads,
        head_dim=scale.hidden // scale.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


@functools.cache
def corpus_tokens() -> tuple[np.ndarray, np.ndarray]:
    """Ids (int32) of the `pretrain` and the `held_out` texts, each between <s> and </s>."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ROOT / "tokenizer" / "tokenizer.json"))
    end = SPECIAL_TOKENS.index("</s>")
    documents = read_corpus()

    def ids(split: str) -> np.ndarray:
        # Byte-level BPE reads a file of megabytes as fast as many small ones: 10 s for all.
        texts = [d.text for d in documents if d.split == split]
        return np.asarray(
            [i for e in tokenizer.encode_batch(texts) for i in (*e.ids, end)], np.int32
        )

    return ids("pretrain"), ids("held_out")


def learning_rate(step: jax.Array, total: jax.Array | int, peak: float) -> jax.Array:
    """Linear from 0 to `peak` in WARMUP_STEPS, then half a cosine to 0 at step `total`."""
    done = jnp.clip((step - WARMUP_STEPS) / jnp.maximum(total - WARMUP_STEPS, 1), 0, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * done))
    return peak * jnp.minimum(step / WARMUP_STEPS, cosine)


def token_losses(model: Decoder, windows: jax.Array) -> jax.Array:
    """Cross-entropy of each next token, `[batch, seq]`, from windows of `seq + 1` ids."""
    return cross_entropy(model(windows[:, :-1]), windows[:, 1:])


def make_steps(
    graph: nnx.GraphDef, peak: float, batch: int, sequence: int
) -> tuple[optax.GradientTransformation, Callable[..., Any], Callable[..., Any]]:
    """The optimizer, and the two jitted programs: a chunk of steps, a mean held-out loss."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
    )

    def loss(weights: Any, windows: jax.Array) -> jax.Array:
        return token_losses(nnx.merge(graph, weights), windows).mean()

    def train(
        weights: Any, state: Any, tokens: jax.Array, step: jax.Array, plan: Plan, key: Any
    ) -> tuple[Any, Any, jax.Array]:
        def one(carry: tuple[Any, Any], index: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
            weights, state = carry
            starts = jax.random.randint(
                jax.random.fold_in(key, index), (batch, 1), 0, tokens.size - sequence - 1
            )
            windows = tokens[starts + jnp.arange(sequence + 1)]
            value, gradient = jax.value_and_grad(loss)(weights, windows)
            update, state = optimizer.update(gradient, state)
            rate = learning_rate(index, plan.steps, peak)
            weights = jax.tree.map(
                lambda w, u, decays: w - rate * (u + plan.weight_decay * decays * w),
                weights,
                update,
                decay_mask(weights),
            )
            return (weights, state), value

        (weights, state), losses = jax.lax.scan(one, (weights, state), step + jnp.arange(CHUNK))
        return weights, state, losses.mean()

    def evaluate(weights: Any, windows: jax.Array) -> jax.Array:
        model = nnx.merge(graph, weights)
        batches = windows[: len(windows) // EVAL_BATCH * EVAL_BATCH]
        batches = batches.reshape(-1, EVAL_BATCH, windows.shape[1])
        return jax.lax.map(lambda w: token_losses(model, w).mean(), batches).mean()

    return optimizer, jax.jit(train, donate_argnums=(0, 1)), jax.jit(evaluate)


def pretrain(
    name: str,
    out: Path,
    plans: Sequence[Plan],
    *,
    minutes: float | None,
    batch: int,
    sequence: int,
    seed: int,
    compute_dtype: Any,
    attention: AttentionName,
) -> dict[str, Any]:
    """Train one scale by every plan, write the best, return what `training.json` holds."""
    scale = SCALES[name]
    tokens, held_out = corpus_tokens()
    vocab_size = 1 + int(max(tokens.max(), held_out.max()))
    vocab_size = -(-vocab_size // 64) * 64
    model = Decoder(
        decoder_config(scale, vocab_size),
        compute_dtype=compute_dtype,
        param_dtype=jnp.float32,
        remat="none",
        attention=attention,
        rngs=nnx.Rngs(seed),
    )
    unfreeze(model)
    graph, initial = nnx.split(model, nnx.Param)
    initial = jax.device_get(initial)
    size = sum(leaf.size for leaf in jax.tree.leaves(initial))
    optimizer, train, evaluate = make_steps(graph, scale.learning_rate, batch, sequence)
    whole = held_out.size // (sequence + 1) * (sequence + 1)
    windows = jnp.asarray(held_out[:whole].reshape(-1, sequence + 1))
    device_tokens, key = jnp.asarray(tokens), jax.random.key(seed)
    print(f"{name}: {size:,} parameters, {tokens.size:,} tokens, {jax.devices()[0]}", flush=True)
    began = time.perf_counter()

    def one_run(plan: Plan) -> tuple[float, Any, list[dict[str, float]], int]:
        weights = jax.device_put(initial)
        state, step, curve, timed = optimizer.init(weights), 0, [], time.perf_counter()
        best, kept = math.inf, initial
        while step < plan.steps:
            weights, state, loss = train(weights, state, device_tokens, jnp.int32(step), plan, key)
            step += CHUNK
            train_loss = float(loss)  # waits for the device
            if minutes is not None and step == 3 * CHUNK:  # the first chunk compiled
                left = minutes * 60 - (time.perf_counter() - began)
                each = (time.perf_counter() - timed) / 2
                # A tenth of the time is kept for evaluation.
                plan = plan._replace(steps=step + int(0.9 * left / each) * CHUNK)
            elif step == CHUNK:
                timed = time.perf_counter()
            # An eighth of the held-out text tells which weights to keep.
            if step >= plan.steps or (step // CHUNK) % max(1, plan.steps // CHUNK // 8) == 0:
                value = float(evaluate(weights, windows[::8]))
                curve.append({"step": step, "loss": train_loss, "held_out_loss": value})
                if value < best:
                    best, kept = value, jax.device_get(weights)
        best = float(evaluate(kept, windows))
        rate = step * batch * sequence / (time.perf_counter() - timed)
        print(
            f"{step} steps, weight decay {plan.weight_decay}: loss {train_loss:.4f}, held-out "
            f"{best:.4f}, {rate:,.0f} tokens/s",
            flush=True,
        )
        return best, kept, curve, step

    runs = [(plan, *one_run(plan)) for plan in plans]
    plan, best, weights, curve, steps = min(runs, key=lambda run: run[1])
    facts = {
        "parameters": size,
        "corpus_tokens": int(tokens.size),
        "steps": steps,
        "tokens_per_step": batch * sequence,
        "epochs": round(steps * batch * sequence / tokens.size, 2),
        "weight_decay": plan.weight_decay,
        "learning_rate": scale.learning_rate,
        "seed": seed,
        "attention": attention,
        "compute_dtype": jnp.dtype(compute_dtype).name,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "seconds": round(time.perf_counter() - began, 1),
        "held_out_loss": round(best, 4),
        "curve": [{k: round(v, 4) for k, v in point.items()} for point in curve],
        "tried": [
            {"steps": s, "weight_decay": p.weight_decay, "held_out_loss": round(value, 4)}
            for p, value, _, _, s in runs
        ],
    }
    write_model(out / name, nnx.merge(graph, jax.device_put(weights)), facts)
    return facts


def write_model(folder: Path, model: Decoder, facts: dict[str, Any]) -> None:
    """The model as a Hugging Face folder, with its tokenizer and what became of its training."""
    save_model(folder, model, dtype=jnp.dtype(jnp.bfloat16))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for kind, token in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>")):
        config[f"{kind}_token_id"] = SPECIAL_TOKENS.index(token)
    for name, content in (("config.json", config), ("training.json", facts)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "tokenizer" / name, folder / name)


def main(arguments: list[str] | None = None) -> None:
    """Train the scales named on the command line, or both."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.embedded.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="SCALE", help=f"of {', '.join(SCALES)}; all")
    parser.add_argument(
        "--out", type=Path, default=MODELS["stdlib-1m"].parent, help="parent folder of the models"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, nargs="+", default=[16], help="passes (16)")
    length.add_argument("--steps", type=count, help="number of steps instead")
    length.add_argument("--minutes", type=float, help="time per model instead")
    parser.add_argument(
        "--weight-decay", type=float, nargs="+", default=[0.5], help="AdamW's, of matrices (0.5)"
    )
    parser.add_argument("--batch", type=count, default=64, help="windows per step (64)")
    parser.add_argument("--sequence", type=count, default=512, help="tokens per window (512)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compute-dtype",
        choices=("float32", "bfloat16"),
        help="of activations and matmuls (bfloat16 on an accelerator, float32 on a CPU)",
    )
    parser.add_argument(
        "--attention",
        choices=("xla", "cudnn"),
        default="xla",
        help="cudnn suits a GPU (xla)",
    )
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(SCALES)
    if unknown:
        parser.error(f"there is no scale {', '.join(sorted(unknown))}: choose {', '.join(SCALES)}.")
    fallback = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    per_epoch = corpus_tokens()[0].size / (options.batch * options.sequence)
    lengths = [math.ceil(epochs * per_epoch) for epochs in options.epochs]
    if options.minutes is not None:
        lengths = [sys.maxsize >> 32]  # until the first chunks have been timed
    elif options.steps is not None:
        lengths = [options.steps]
    plans = [Plan(steps, decay) for steps in lengths for decay in options.weight_decay]
    for name in options.names or SCALES:
        facts = pretrain(
            name,
            options.out,
            plans,
            minutes=options.minutes,
            batch=options.batch,
            sequence=options.sequence,
            seed=options.seed,
            compute_dtype=jnp.dtype(options.compute_dtype or fallback),
            attention=options.attention,
        )
        print(f"{name}: held-out loss {facts['held_out_loss']} in {facts['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
