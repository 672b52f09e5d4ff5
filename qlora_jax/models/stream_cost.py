"""What streaming weights costs: bytes over PCIe, arithmetic, and from how many tokens it is free.

A micro-batch moves every streamed byte twice, whatever its size; its arithmetic grows with its
tokens. So there is a number of tokens from which the copies hide behind the products:

    tokens · flops_per_token / rate  ≥  transfer_bytes / bandwidth

The card's rate is the vendor's (`pallas_kernels.cards`), which no real step reaches: a slower step
hides more, so the number is an upper bound. Estimates all, until a card has measured them.
"""

import dataclasses
import math
from typing import Any

import jax
from flax import nnx

from pallas_kernels.cards import Card
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.streaming import host_bytes, streams
from qlora_jax.nn import FrozenParam
from qlora_jax.quant import QuantizedTensor

PCIE = {3: 12e9, 4: 25e9, 5: 50e9}
"""Generation -> bytes/s of pinned copies over 16 lanes: four fifths of the nominal rate."""


@dataclasses.dataclass(frozen=True)
class StreamCost:
    """A training step's transfers and arithmetic; see `stream_cost`."""

    host: int
    """Bytes of frozen weights that rest in pinned host memory."""
    transfer: int
    """Bytes that cross to the card in one micro-batch, forward and backward."""
    flops_per_token: float
    """Of forward pass, recomputation and backward pass, for one token."""

    def seconds_of_transfer(self, bandwidth: float) -> float:
        """Of one micro-batch, at `bandwidth` bytes/s."""
        return self.transfer / bandwidth

    def seconds_of_compute(self, tokens: int, card: Card) -> float:
        """Of a micro-batch of so many tokens, at the card's full rate."""
        return tokens * self.flops_per_token / card.matmul_flops

    def tokens_to_hide(self, card: Card, bandwidth: float) -> int:
        """Tokens of a micro-batch from which its transfers hide behind its arithmetic."""
        seconds = self.seconds_of_transfer(bandwidth)
        return int(-(-seconds * card.matmul_flops // self.flops_per_token))


def stream_cost(model: Decoder, *, sequence: int) -> StreamCost:
    """The cost of streaming a model's layers.

    Per token: a frozen weight is multiplied three times (forward, again for the backward pass, and
    for the gradient of its input), an adapter's four times (its own gradient too), the head twice,
    at two operations each; attention's two products over the keys a token sees, half the sequence
    on average, count four times.

    Args:
        model: concrete or of shapes (`nnx.eval_shape`).
        sequence: tokens of an example, which decides attention's share.
    """
    config = model.config

    def weights(kind: type[nnx.Variable]) -> int:
        values, _ = jax.tree_util.tree_flatten_with_path(
            nnx.to_pure_dict(nnx.state(model.layers, kind)),
            is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor),
        )
        # Matrices alone: norms and biases are no products.
        return sum(
            _multiplied(path, value, config)
            for path, value in values
            if isinstance(value, QuantizedTensor) or value.ndim > 2
        )

    layers = config.num_hidden_layers
    attention = 2 * (sequence / 2) * config.num_attention_heads * config.head_dim * layers
    head = config.vocab_size * config.hidden_size
    stacks = jax.tree.leaves(nnx.state(model.layers, FrozenParam))
    one_layer = sum(s.size // layers * s.dtype.itemsize for s in stacks if streams(s))
    host = host_bytes(model.layers)
    return StreamCost(
        host=host,
        # The forward loop fetches its last layer twice, the backward loop finds it and fetches its
        # last one (the first layer) twice.
        transfer=2 * host + one_layer,
        flops_per_token=2
        * (3 * weights(FrozenParam) + 4 * weights(nnx.LoRAParam) + 2 * head + 4 * attention),
    )


def _multiplied(path: tuple, value: Any, config: DecoderConfig) -> int:
    """Weights of all layers that one token is multiplied by: of experts, those that it goes to."""
    quantized = isinstance(value, QuantizedTensor)
    size = value.size * math.prod(value.stack_shape) if quantized else value.size
    if config.num_local_experts and "experts" in jax.tree_util.keystr(path):
        return size * config.num_experts_per_tok // config.num_local_experts
    return size
