"""The Variable types of a QLoRA model: weights never trained, weights trained whole, adapters.

`nnx.LoRAParam` is a subclass of `nnx.Param`, so a frozen base kept in `nnx.Param` could not be told
from adapters by that filter. Types of their own keep them apart:

    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)     # what is trained | all the rest
    nnx.state(model, FrozenParam)                                   # the frozen base
    nnx.state(model, TrainedParam)                                  # base weights that are trained

`TrainedParam` is a subclass of `nnx.LoRAParam`: whatever splits off adapters (the training step,
its checkpoints) takes it along, and nothing there needs to know of it.
"""

from typing import Any

import jax
from flax import nnx


class FrozenParam(nnx.Variable):
    """A weight of the frozen base: an array, or a `QuantizedTensor` (a pytree of arrays)."""


class TrainedParam(nnx.LoRAParam):
    """A weight of the base that is trained and saved whole: PEFT's `modules_to_save`, trained
    biases, the rows of added tokens. It is found wherever adapters are found."""


def trained(weight: Any) -> TrainedParam:
    """A frozen weight as a trained one, in the device's own memory: frozen ones alone stream."""
    concrete = isinstance(weight, jax.Array) and not isinstance(weight, jax.core.Tracer)
    if concrete and weight.sharding.memory_kind == "pinned_host":
        weight = jax.device_put(weight, weight.sharding.with_memory_kind("device"))
    return TrainedParam(weight)
