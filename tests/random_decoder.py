"""A random decoder whose weights NumPy draws, so that no program is compiled for them.

`Decoder(...)` draws and quantizes each weight on the device. For a tiny model XLA compiles a dozen
programs for that, one for every shape, which takes longer than the training step's own. Where a
test is not about how a model starts, this one has the same structure and magnitudes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.codebooks import CODEBOOKS
from qlora_jax.models import Decoder, DecoderConfig
from qlora_jax.models.embedding import Embedding
from qlora_jax.models.moe import MixtureOfExperts
from qlora_jax.models.norm import LayerNorm, RMSNorm
from qlora_jax.nn import QuantDense
from qlora_jax.quant import QuantizedTensor

ONE_LAYER = DecoderConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
)
"""As small as a decoder can be that reads the tokens of stories260K."""


def random_decoder(config: DecoderConfig, *, seed: int = 0, **options: Any) -> Decoder:
    """`Decoder(config, **options)`; DoRA's start, which follows from the weights, is not drawn."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))
    rng = np.random.default_rng(seed)
    for _, node in nnx.iter_graph(model):
        match node:
            case QuantDense():
                _put(node.kernel, _weight(rng, node.kernel.get_value(), node.in_features**-0.5))
                _put(node.bias, 0.0)
                bound = node.in_features**-0.5
                if node.lora_A is not None:
                    _put(node.lora_A, rng.uniform(-bound, bound, node.lora_A.get_value().shape))
                _put(node.lora_B, 0.0)
            case Embedding():
                _put(node.weight, _weight(rng, node.weight.get_value(), 0.02))
            case MixtureOfExperts():
                _put(node.gate, rng.normal(size=node.gate.get_value().shape) * 0.02)
            case RMSNorm():
                _put(node.weight, 1.0 - node.offset)
            case LayerNorm():
                _put(node.weight, 1.0)
                _put(node.bias, 0.0)
    for leaf in jax.tree.leaves(nnx.state(model)):
        assert isinstance(leaf, jax.Array), f"{leaf} is not filled"
    return model


def _weight(rng: np.random.Generator, like: Any, deviation: float) -> Any:
    """An array, or packed codes of numbers, of this standard deviation."""
    if not isinstance(like, QuantizedTensor):
        return rng.normal(size=like.shape) * deviation
    scale = deviation / np.std(CODEBOOKS[like.quant_type])
    near = rng.uniform(0.8, 1.2, like.absmax.shape) * scale
    leaves: dict[str, Any] = {
        "codes": rng.integers(1, 256, like.codes.shape, np.uint8),
        "absmax": near.astype(np.float32),
    }
    if like.nested_absmax is not None:
        leaves |= {
            "absmax": rng.integers(0, 256, like.absmax.shape, np.uint8),
            "nested_absmax": np.full(like.nested_absmax.shape, 0.2 * scale, np.float32),
            "offset": np.full(like.offset.shape, scale, np.float32),
        }
    return QuantizedTensor(
        **{name: jnp.asarray(leaf) for name, leaf in leaves.items()},
        shape=like.shape,
        dtype=like.dtype,
        quant_type=like.quant_type,
        blocksize=like.blocksize,
    )


def _put(variable: nnx.Variable | None, value: Any) -> None:
    """Sets a variable, if there is one, in its own shape and dtype."""
    if variable is None:
        return
    if not isinstance(value, QuantizedTensor):
        like = variable.get_value()
        value = jnp.asarray(np.broadcast_to(value, like.shape).astype(like.dtype))
    variable.set_value(value)
