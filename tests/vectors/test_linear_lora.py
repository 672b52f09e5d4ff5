"""`QuantDense`, forward and gradients, against bitsandbytes' Linear4bit inside PEFT's LoRA."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import qlora_jax as ql
from tests.shared import SHARED, shared_path

CASES = sorted(p.stem for p in (SHARED / "vectors/linear_lora").glob("*.safetensors"))
# Largest error over the array's largest magnitude. 16 bits: one rounding of the operands.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case: str) -> None:
    folder = shared_path("vectors/linear_lora")
    arrays = load_file(folder / f"{case}.safetensors")
    info = json.loads((folder / "index.json").read_text())[case]
    lora = ql.LoraConfig(r=64, alpha=16, dtype=arrays["lora_A"].dtype)
    assert lora.scaling == info["scaling"]
    compute_dtype = jnp.dtype(info["compute_dtype"].removeprefix("torch."))
    layer = ql.QuantDense.from_weight(
        jnp.asarray(arrays["weight"]),
        jnp.asarray(arrays["bias"]) if info["bias"] else None,
        quant=ql.QuantConfig(info["quant_type"], double_quant=info["double_quant"]),
        lora=lora,
        compute_dtype=compute_dtype,
        rngs=nnx.Rngs(0),
    )
    layer.lora_A[...] = jnp.asarray(arrays["lora_A"])
    layer.lora_B[...] = jnp.asarray(arrays["lora_B"])
    graphdef, params, rest = nnx.split(layer, nnx.LoRAParam, ...)

    def forward(params, x):
        return nnx.merge(graphdef, params, rest)(x).astype(x.dtype)

    y, pullback = jax.vjp(forward, params, jnp.asarray(arrays["x"]))
    grads, grad_x = pullback(jnp.asarray(arrays["grad_y"]).astype(y.dtype))
    tolerance = TOLERANCE[compute_dtype.name]
    assert relative_error(y, arrays["y"]) < tolerance
    assert relative_error(grad_x, arrays["grad_x"]) < tolerance
    assert relative_error(grads["lora_A"][...], arrays["grad_lora_A"]) < tolerance
    assert relative_error(grads["lora_B"][...], arrays["grad_lora_B"]) < tolerance
