"""Training the base itself: frozen weights become trained ones."""

from flax import nnx

from qlora_jax.nn import FrozenParam
from qlora_jax.nn.variables import trained
from qlora_jax.quant import QuantizedTensor


def unfreeze(model: nnx.Module) -> None:
    """Makes every dense base weight trainable, in place: each `FrozenParam` becomes a
    `TrainedParam`, which `train.fit` trains as it does adapters.

    For pretraining and full finetuning.

    Raises:
        ValueError: a weight is quantized; codes have no gradient.
    """
    for path, node in nnx.iter_graph(model):
        if not isinstance(node, nnx.Module):
            continue
        for name, value in list(vars(node).items()):
            if isinstance(value, FrozenParam):
                weight = value.get_value()
                if isinstance(weight, QuantizedTensor):
                    where = ".".join(map(str, (*path, name)))
                    raise ValueError(
                        f"{where} is quantized, and codes cannot be trained: build or load the "
                        "model with quant=None and embedding_bits=None to train its base weights."
                    )
                setattr(node, name, trained(weight))
