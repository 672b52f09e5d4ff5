"""The Variable type of weights that are never trained.

`nnx.LoRAParam` is a subclass of `nnx.Param`, so a frozen base kept in `nnx.Param` could not be told
from adapters by that filter. A type of its own keeps the three apart:

    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)     # adapters | all the rest
    nnx.state(model, FrozenParam)                                   # the frozen base
"""

from flax import nnx


class FrozenParam(nnx.Variable):
    """A weight of the frozen base: an array, or a `QuantizedTensor` (a pytree of arrays)."""


class TrainedParam(nnx.LoRAParam):
    """A weight of the base that is trained and saved whole: PEFT's `modules_to_save`, trained
    biases, the rows of added tokens. It is found wherever adapters are found."""
