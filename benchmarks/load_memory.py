"""Peak host memory of `qlora-jax quantize` on a sharded checkpoint in the shape of Llama-3.1-8B.

    python -m benchmarks.load_memory                  # 16 GB written, then 5.6 GB
    python -m benchmarks.load_memory --layers 4       # 5.6 GB, then 2.6 GB

The checkpoint is random bfloat16 weights in shards of 5 GB, made in a temporary folder (`--folder`
chooses where) and deleted at the end. The command runs in a process of its own, whose largest
resident set the system reports: it counts the interpreter, JAX and the pages of the shard that is
mapped while a tensor is read. Prints one JSON line.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from qlora_jax.checkpoints.checkpoint import Checkpoint, TensorInfo
from qlora_jax.checkpoints.save import save_checkpoint
from qlora_jax.models import family_of

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_CHUNK = 2**22


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama and its shape."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    by_suffix = {
        "embed_tokens.weight": (config["vocab_size"], hidden),
        "lm_head.weight": (config["vocab_size"], hidden),
        "k_proj.weight": (keys, hidden),
        "v_proj.weight": (keys, hidden),
        "gate_proj.weight": (wide, hidden),
        "up_proj.weight": (wide, hidden),
        "down_proj.weight": (hidden, wide),
        "q_proj.weight": (hidden, hidden),
        "o_proj.weight": (hidden, hidden),
        "norm.weight": (hidden,),  # layernorm.weight too
    }
    family = family_of(config)
    return {
        name: next(shape for suffix, shape in by_suffix.items() if name.endswith(suffix))
        for name in family.weight_names(family.read_config(config))
    }


def random_checkpoint(config: dict) -> Checkpoint:
    """Normal weights of deviation 0.02, one chunk of them over and over."""
    chunk = np.random.default_rng(0).standard_normal(_CHUNK, np.float32) * np.float32(0.02)
    chunk = chunk.astype(ml_dtypes.bfloat16)
    tensors = {name: TensorInfo(shape, "BF16") for name, shape in shapes(config).items()}

    def read(name: str) -> np.ndarray:
        shape = tensors[name].shape
        return np.resize(chunk, int(np.prod(shape))).reshape(shape)

    return Checkpoint(Path("random"), config, tensors, read)


def size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    """Measures once."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=LLAMA_8B["num_hidden_layers"])
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's)")
    args = parser.parse_args()
    config = LLAMA_8B | {"num_hidden_layers": args.layers}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        source, result = Path(temporary) / "dense", Path(temporary) / "nf4"
        save_checkpoint(source, random_checkpoint(config), max_shard_size="5GB")
        call = "import sys; from qlora_jax.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", call, "quantize", str(source), str(result)]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        # Linux counts in KiB.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(
            json.dumps(
                {
                    "layers": args.layers,
                    "source_bytes": size(source),
                    "result_bytes": size(result),
                    "peak_resident_bytes": peak,
                    "peak_minus_result_gib": round((peak - size(result)) / 2**30, 3),
                    "seconds": round(seconds, 1),
                    "cores": os.cpu_count(),
                }
            )
        )


if __name__ == "__main__":
    main()
