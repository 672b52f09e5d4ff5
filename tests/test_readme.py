"""The README's Python runs as it stands there (the hub's name replaced by an embedded model)."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.embedded import MODELS

README = Path(__file__).parents[1] / "README.md"


class TwoLayers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query = nnx.Linear(64, 64, rngs=rngs)
        self.value = nnx.Linear(64, 64, rngs=rngs)


def test_python_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    code = "\n".join(blocks)
    hub_name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_name in code
    names = {
        "jnp": jnp,
        "weight": jax.random.normal(jax.random.key(0), (64, 64)),
        "my_model": TwoLayers(nnx.Rngs(0)),
    }
    exec(code.replace(hub_name, str(MODELS["stdlib-1m"])), names)
    assert names["t"].bits_per_weight > 4
    assert nnx.state(names["my_model"], nnx.LoRAParam)
    assert jax.tree.leaves(names["lora"])
