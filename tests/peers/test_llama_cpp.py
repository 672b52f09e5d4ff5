"""GGUF files that are written here, in llama.cpp itself: what it predicts, and how it cuts texts.

Random models of every architecture, in float32, by way of node-llama-cpp; one process reads all.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.embedded import ROOT
from qlora_jax.checkpoints import load_model, open_checkpoint, save_gguf, save_model
from qlora_jax.data import load_tokenizer
from qlora_jax.models import FAMILIES
from tests.random_decoder import random_decoder
from tests.shared import shared_path

MODULES = Path(sys.prefix) / "node_modules"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(
    NODE is None or not (MODULES / "node-llama-cpp").is_dir(),
    reason="make test-peers installs llama.cpp where there is npm",
)

BASE = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 8}
GRANITE = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 7.0,
}
BIASED = {"attention_bias": True, "mlp_bias": True}
# The name before the dash is the family.
MODELS: dict[str, dict[str, Any]] = {
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biased": BIASED,
    "llama-wide": {"head_dim": 32},
    "llama-llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA_3},
    "llama-linear": {"rope_scaling": LINEAR},
    "mistral-yarn": {"rope_scaling": YARN},
    "qwen2-yarn": {"rope_scaling": YARN},
    "qwen3-wide": {"head_dim": 32},
    "phi3-partial": {"partial_rotary_factor": 0.5},
    "granite-biased": {**GRANITE, **BIASED},
    "granite-llama3": {**GRANITE, "rope_scaling": LLAMA_3},
    "smollm3-yarn": {"rope_scaling": YARN},
    "olmo2-linear": {"rope_scaling": LINEAR},
    "olmo3-yarn": {"sliding_window": 8, "rope_theta": 5e5, "rope_scaling": YARN},
    "olmo3-linear": {"sliding_window": 8, "rope_scaling": LINEAR},
    "stablelm-biased": {"use_qkv_bias": True},
    "stablelm-whole": {"partial_rotary_factor": 1.0, "rope_scaling": YARN},
    "starcoder2-tied": {},
    "gemma-linear": {"rope_scaling": LINEAR},
    "gemma2-yarn": {**GEMMA, "rope_scaling": YARN},
    "gemma3_text-linear": {
        **GEMMA,
        "num_hidden_layers": 7,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": LINEAR,
    },
}
GELU = ("starcoder2", "gemma", "gemma2", "gemma3_text")
"""llama.cpp looks GELU up in a table of float16: up to 5.6e-3 were seen of these, 3.5e-5 of others.
By hand, with such a table in `numpy_decoder`: what was 5.1e-3 of a Gemma is 5e-4."""
IDS = np.random.default_rng(0).integers(5, 2000, 24).astype(np.int32)

TOKENIZERS = {
    "smollm2": ("data/models/smollm2-135m-instruct", 49152),
    "llama2": ("data/tokenizers/llama2", 32000),
    "mistral": ("data/tokenizers/mistral-v0.1", 32000),
}
TEXTS = [
    "Hello, world!",
    "  two spaces",
    "tabs\tand\nlines\r\n\n\nend",
    "I'll we'VE don't CAN'T",
    "1234567 12 3.14159",
    "naïve café — “quotes” … 你好，世界 👩‍👩‍👧 🎉",
    "def f(x):\n    return x**2  # comment\n",
    "   ",
    "",
    " a ",
    "\u00a0no break\u200bzero e\u0301 ﬁ ½ ² Ⅷ",
    "αβγ русский हिन्दी العربية",
    "...---___===",
]


def write(folder: Path, tokenizer: Path, family: str, **fields: Any) -> Path:
    """A folder with a random model, its norms and biases too, and its GGUF file."""
    config = FAMILIES[family].read_config({**BASE, "model_type": family, **fields})
    model, rng = random_decoder(config), np.random.default_rng(1)

    def drawn(path: Any, x: jax.Array) -> jax.Array:
        is_norm = "norm" in jax.tree_util.keystr(path) and "weight" in jax.tree_util.keystr(path)
        around = 1 - config.norm_offset if is_norm else 0
        return jnp.asarray(around + 0.2 * rng.normal(size=x.shape), x.dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(drawn, nnx.state(model)))
    save_model(folder, model, dtype=np.dtype("float32"))
    for file in tokenizer.iterdir():
        if file.name.startswith("tokenizer"):
            shutil.copyfile(file, folder / file.name)
    # A name with "phi3" in it would make llama.cpp look for Phi-3's own tokens.
    path = folder.with_suffix(".gguf")
    save_gguf(path, open_checkpoint(folder), "F32", name="random")
    return path


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Where the models lie, and what llama.cpp says of each."""
    here = tmp_path_factory.mktemp("llama_cpp")
    jobs = {}
    for name, fields in MODELS.items():
        path = write(here / name, ROOT / "tokenizer", name.partition("-")[0], **fields)
        jobs[name] = {"path": str(path), "tokens": IDS.tolist(), "texts": TEXTS}
    for name, (source, size) in TOKENIZERS.items():
        small = {"vocab_size": size, "num_hidden_layers": 1}
        path = write(here / name, shared_path(source), "llama", **small)
        jobs[name] = {"path": str(path), "tokens": [5], "texts": TEXTS}
    (here / "jobs.json").write_text(json.dumps(list(jobs.values())))
    script = Path(__file__).with_name("llama_cpp.mjs")
    arguments = [NODE, script, MODULES, here / "jobs.json", here / "answers.json"]
    subprocess.run(list(map(str, arguments)), check=True, timeout=600)
    found = json.loads((here / "answers.json").read_text())
    return here, dict(zip(jobs, found, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_predicts_the_same(name: str, answers: tuple[Path, dict[str, Any]]) -> None:
    folder, answer = answers[0] / name, answers[1][name]
    assert "error" not in answer, answer
    model = load_model(folder, quant=None, lora=None, compute_dtype=jnp.float32)
    ours = np.asarray(jax.nn.log_softmax(jax.jit(model)(IDS[None])[0]))
    assert len(answer["probabilities"]) == len(IDS)
    seen = [
        (math.log(probability), ours[i, token])
        for i, row in enumerate(answer["probabilities"])
        for token, probability in row
        if probability > 1e-6
    ]
    assert len(seen) > 1000 * len(IDS)
    bound = 1e-2 if name.partition("-")[0] in GELU else 1e-4
    np.testing.assert_allclose(*np.transpose(seen), rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["llama-tied", *TOKENIZERS])
def test_llama_cpp_cuts_texts_into_the_same_tokens(
    name: str, answers: tuple[Path, dict[str, Any]]
) -> None:
    tokenizer = load_tokenizer(answers[0] / name)
    assert answers[1][name]["ids"] == [tokenizer.encode(text, bos=False) for text in TEXTS]
