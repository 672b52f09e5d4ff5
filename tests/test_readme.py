"""The Python of README and docs runs as it stands there (an embedded model in the hub's place)."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.embedded import MODELS
from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.cli import main

ROOT = Path(__file__).parents[1]


def python_of(page: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


class TwoLayers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query = nnx.Linear(64, 64, rngs=rngs)
        self.value = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 8, rngs=rngs)


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}."} for i in range(8)]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["quantize", str(MODELS["stdlib-1m"]), "smollm2-nf4"]) == 0
    code = python_of("README.md")
    changes = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(MODELS["stdlib-1m"]),
        "steps=200": "steps=2",
    }
    for there, here in changes.items():
        assert there in code
        code = code.replace(there, here)
    names = {
        "jnp": jnp,
        "weight": jax.random.normal(jax.random.key(0), (64, 64)),
        "my_model": TwoLayers(nnx.Rngs(0)),
    }
    exec(code, names)
    assert names["t"].bits_per_weight > 4
    assert nnx.state(names["my_model"], nnx.LoRAParam)
    assert jax.tree.leaves(names["lora_state"])
    # The model at the end is the 4-bit folder's, with the adapter that was trained at the start.
    trained = nnx.to_flat_state(names["lora_state"])
    loaded = dict(nnx.to_flat_state(nnx.state(names["model"], nnx.LoRAParam)))
    assert all((loaded[path][...] == value[...]).all() for path, value in trained)


@pytest.mark.slow
def test_python_of_the_pages_on_adapters_and_merging_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODELS["stdlib-1m"], "base")
    code = python_of("docs/adapters.md")
    assert "folder-or-hub-name" in code
    names = {"nnx": nnx, "my_model": TwoLayers(nnx.Rngs(0))}
    exec(code.replace("folder-or-hub-name", "base"), names)
    assert "<|im_end|>" in Path("adapter", "tokenizer.json").read_text()
    assert isinstance(names["my_model"].head.kernel, nnx.LoRAParam)
    exec(python_of("docs/merging.md"), names)
    assert not [x for _, x in nnx.iter_modules(names["model"]) if getattr(x, "lora", None)]
    merged, base = (open_checkpoint(folder).tensors for folder in ("merged", "base"))
    assert merged.keys() == base.keys()
    rows = "model.embed_tokens.weight"
    assert merged[rows].shape[0] == base[rows].shape[0] + 2
