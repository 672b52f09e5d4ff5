"""`QuantDenseGeneral`: a `QuantDense` in the place of an `nnx.LinearGeneral`.

Several axes of the input are contracted at once and several come out, such as an attention's
[heads, head_dim]. To quantization that is one matrix [out, in] as any other: the axes are laid side
by side before the product and taken apart after it. `nnx.MultiHeadAttention` is made of these.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pallas_kernels import spec_entries
from qlora_jax.nn.dense import QuantDense


class QuantDenseGeneral(QuantDense):
    """A frozen 4-bit linear layer of several axes, with optional LoRA.

    Attributes:
        in_shape, out_shape: sizes of the axes that go in and come out; `in_features` and
            `out_features` are their products.
        axis: where in the input the axes of `in_shape` are, in the input's order whatever theirs
            here (as of `nnx.LinearGeneral`). Those that come out are its last.
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        axis: int | Sequence[int] = -1,
        **options: Any,
    ) -> None:
        """A layer with a fresh random weight.

        Args:
            in_features, out_features, axis: as of `nnx.LinearGeneral`.
            **options: of `QuantDense`, whose `kernel_init` gives the weight as a matrix.

        Raises:
            ValueError: not as many axes as sizes that go in.
        """
        self.in_shape, self.out_shape, self.axis = map(_tuple, (in_features, out_features, axis))
        if len(self.in_shape) != len(self.axis):
            raise ValueError(
                f"in_features is {self.in_shape} and axis {self.axis}; give one axis for each size"
            )
        super().__init__(math.prod(self.in_shape), math.prod(self.out_shape), **options)

    def __call__(
        self,
        x: Float[Array, "..."],
        out_sharding: jax.sharding.NamedSharding | jax.P | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "..."]:
        """[batch axes of x, out_shape] in `compute_dtype`.

        Args:
            x: `in_shape` on the axes `axis`; all others are batch axes.
            out_sharding: as of `QuantDense`; None cuts batch axes as they are in x, and no others.
            dropout_key: as of `QuantDense`.

        Raises:
            ValueError: x has other sizes there, or the layer is a stack.
        """
        return self._call(x, out_sharding, dropout_key)

    def _check_input(self, x: Array) -> None:
        sizes = tuple(x.shape[axis] for axis in self._contracted(x.ndim))
        if sizes != self.in_shape:
            raise ValueError(
                f"x has shape {x.shape}, but the layer takes {self.in_shape} on the axes "
                f"{self.axis}"
            )

    def _output(
        self, x: Float[Array, "..."], dropout_key: Key[Array, ""] | None
    ) -> Float[Array, "..."]:
        axes = self._contracted(x.ndim)
        x = jnp.moveaxis(x, axes, range(-len(axes), 0))
        batch = x.shape[: x.ndim - len(axes)]
        y = super()._output(x.reshape(*batch, self.in_features), dropout_key)
        return y.reshape(*batch, *self.out_shape)

    def _cut(self, x: Any, weight: Any) -> jax.P:
        contracted = self._contracted(x.ndim)
        batch = [cut for axis, cut in enumerate(spec_entries(x)) if axis not in contracted]
        return jax.P(*batch, *[None] * len(self.out_shape))

    def _contracted(self, ndim: int) -> list[int]:
        """`axis` from the front, of those that an input of so many axes has, in their order."""
        return sorted(axis % ndim for axis in self.axis if -ndim <= axis < ndim)


def _tuple(sizes: int | Sequence[int]) -> tuple[int, ...]:
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)
