"""The README's Python runs as it stands there (the hub's name replaced by an embedded model)."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.embedded import MODELS
from qlora_jax.cli import main

README = Path(__file__).parents[1] / "README.md"


class TwoLayers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query = nnx.Linear(64, 64, rngs=rngs)
        self.value = nnx.Linear(64, 64, rngs=rngs)


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}."} for i in range(8)]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["quantize", str(MODELS["stdlib-1m"]), "smollm2-nf4"]) == 0
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    code = "\n".join(blocks)
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
