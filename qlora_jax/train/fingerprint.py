"""What a run is, read off its model and its data.

A run folder is bound to this without anybody naming it: a checkpoint's shapes also fit adapters
that multiply otherwise, weights of another data type, and other rows. What is not to be seen here,
such as which base model it is, `fit`'s `identity` says.
"""

import collections
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from qlora_jax.data.examples import digest
from qlora_jax.nn import FrozenParam, LoraConfig, QuantDense
from qlora_jax.quant import QuantizedTensor


def fingerprint(model: nnx.Module, batches: Any) -> dict[str, str]:
    """Of adapters and quantized weights how many there are of each kind, in words, and what tells
    the run's first batch from others.

    Args:
        model: with its adapters.
        batches: `batches.at(0)` is the batch of the first step.
    """
    layers = (node for _, node in nnx.iter_graph(model) if isinstance(node, QuantDense))
    weights = jax.tree.leaves(nnx.state(model, FrozenParam), is_leaf=_is_quantized)
    return {
        "adapters": _counted(_adapter(layer.lora) for layer in layers if layer.lora is not None),
        "quantized": _counted(_weight(weight) for weight in weights if _is_quantized(weight)),
        "first_batch": digest(np.asarray(leaf) for leaf in jax.tree.leaves(batches.at(0))),
    }


def _is_quantized(value: Any) -> bool:
    return isinstance(value, QuantizedTensor)


def _adapter(lora: LoraConfig) -> str:
    kind = "DoRA" if lora.use_dora else "LoRA"
    return f"{kind} r={lora.r} scaling={lora.scaling:g} dropout={lora.lora_dropout:g}"


def _weight(weight: QuantizedTensor) -> str:
    scales = "double quantization" if weight.double_quant else "absmax in float32"
    return f"{weight.quant_type} in blocks of {weight.blocksize}, {scales}"


def _counted(kinds: Iterable[str]) -> str:
    counts = sorted(collections.Counter(kinds).items())
    return "; ".join(f"{count} × {kind}" for kind, count in counts) or "none"
