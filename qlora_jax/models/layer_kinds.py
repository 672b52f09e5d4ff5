"""What differs from layer to layer, where all layers are one stack and run as one program.

Some may see a window only, turn by frequencies of their own, or not turn at all. A scan goes along
flags [layers] that say which (`layer_kinds`), and what does not differ has no flag.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.rope import rotations

Turn = tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]
"""Cosine and sine of positions."""


class LayerKinds(NamedTuple):
    """Of every layer, [layers], or of one, []; None where all are alike.

    Attributes:
        sliding: whether it sees `sliding_window` tokens only.
        still: whether it does not turn its queries and keys.
    """

    sliding: Bool[Array, "*layers"] | None
    still: Bool[Array, "*layers"] | None


def layer_kinds(config: DecoderConfig) -> LayerKinds:
    """The layers of a stack."""

    def flags(layers: tuple[bool, ...]) -> Array | None:
        return None if len(set(layers)) == 1 else jnp.asarray(layers)

    still = tuple(not turns for turns in config.turned_layers)
    return LayerKinds(flags(config.sliding_layers), flags(still))


class Turns(NamedTuple):
    """How layers turn queries and keys; None for not at all.

    Attributes:
        usual: of most.
        local: of sliding layers, where these have their own.
    """

    usual: Turn | None
    local: Turn | None

    def of(self, kind: LayerKinds) -> Turn | None:
        """Those of one layer."""
        turn: Turn | None = chosen(kind.sliding, self.local, self.usual)
        if turn is None or kind.still is None:
            return turn
        cos, sin = turn
        return jnp.where(kind.still, 1, cos), jnp.where(kind.still, 0, sin)


def turns_for(
    config: DecoderConfig, positions: Int[Array, "batch seq"], length: int | None
) -> Turns:
    """The turns of positions, of a text of `length` (see `rotations`)."""
    rope, local, dim = config.rope, config.local_rope, config.head_dim
    if rope is None or not any(config.turned_layers):
        return Turns(None, None)
    if local is not None and all(config.sliding_layers):
        rope = local
    return Turns(
        rotations(positions, rope, dim, length),
        None if local is None else rotations(positions, local, dim, length),
    )


def chosen(flag: Bool[Array, ""] | None, yes: Any, no: Any) -> Any:
    """`yes` where the flag is set and there is one, else `no`; both are pytrees of arrays."""
    if flag is None or yes is None:
        return no
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), yes, no)
