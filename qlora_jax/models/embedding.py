"""The vocabulary matrix: rows on the way in, scores on the way out.

It may be packed, in 8 or 4 bits (`quant.rows`): then the rows that a text names are gathered as
codes and only they are decoded, and scores decode a piece of the rows at a time (`quant.scores`).
Either way a packed matrix gives what a dense one of the numbers that its codes stand for would.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from qlora_jax.nn import FrozenParam, TrainedParam
from qlora_jax.quant import (
    QuantConfig,
    QuantizedTensor,
    append_rows,
    mean_row,
    put_rows,
    quantize,
    row_config,
    row_scores,
    take_rows,
)


def check_ids(input_ids: Any) -> None:
    """TypeError for a list of token ids, or for one row of them without its axis."""
    array = hasattr(input_ids, "shape")
    if not array or input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        kind = f"a {type(input_ids).__name__}"
        given = f"{input_ids.dtype} {list(input_ids.shape)}" if array else kind
        raise TypeError(
            f"input_ids is {given}, but integers [batch, seq] are needed: give jnp.asarray([ids])."
        )


class Embedding(nnx.Module):
    """The vocabulary matrix `[vocab, embed]`: rows on the way in, scores on the way out.

    Args:
        vocab, embed: the matrix's shape.
        dtype: of the weight, or of what its codes are decoded to.
        bits: 8 or 4 to keep it packed; None keeps it dense.
        rngs: stream `params`.

    Attributes:
        weight: `FrozenParam` [vocab, embed], an array or a `QuantizedTensor`; or a trained array.
        token_ids: `FrozenParam` [n], int32: rows that `token_rows` stands for; or None.
        token_rows: `TrainedParam` [n, embed]: those rows, dense and trained while the matrix stays
            frozen (`tokens.py`); or None.
        over: the axis of a mesh that the matrix is cut along, set by `spread`; None: not cut.

    Raises:
        ValueError: bits that there are not, or rows that do not fill whole blocks.
    """

    over: str | None = None

    def __init__(
        self, vocab: int, embed: int, *, dtype: Any, bits: int | None = None, rngs: nnx.Rngs
    ) -> None:
        init = (jax.random.normal(rngs.params(), (vocab, embed), jnp.float32) * 0.02).astype(dtype)
        self.weight = FrozenParam(init if bits is None else quantize(init, row_config(bits, embed)))
        self.token_ids: FrozenParam | None = nnx.data(None)
        self.token_rows: TrainedParam | None = nnx.data(None)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and their width."""
        return self.weight.get_value().shape

    @property
    def quant(self) -> QuantConfig | None:
        """How the rows are packed; None where they are dense."""
        weight = self.weight.get_value()
        if not isinstance(weight, QuantizedTensor):
            return None
        return QuantConfig(weight.quant_type, weight.blocksize, weight.double_quant)

    def mean(self, count: int) -> Float32[Array, " embed"]:
        """The mean of the first `count` rows, trained ones not looked at."""
        weight = self.weight.get_value()
        if isinstance(weight, QuantizedTensor):
            return mean_row(weight, count)
        return jnp.mean(weight[:count], axis=0, dtype=jnp.float32)

    def grow(self, size: int) -> None:
        """Appends frozen rows until there are `size`, each the mean of those there are; in place.

        Packed rows are quantized like the others, whose codes stay as they are.
        """
        rows, width = self.shape
        if size > rows:
            weight = self.weight.get_value()
            more = self._stored(jnp.broadcast_to(self.mean(rows), (size - rows, width)))
            if isinstance(weight, QuantizedTensor):
                self.weight.set_value(append_rows(weight, more))
            else:
                self.weight.set_value(jnp.concatenate([weight, more]))

    def set_rows(self, ids: Int[Array, " n"], row: Float[Array, " embed"]) -> None:
        """Puts one and the same frozen row in the places of `ids`, each named once; in place."""
        weight = self.weight.get_value()
        rows = self._stored(jnp.broadcast_to(row, (ids.size, row.size)))
        if isinstance(weight, QuantizedTensor):
            self.weight.set_value(put_rows(weight, ids, rows))
        else:
            self.weight.set_value(weight.at[ids].set(rows))

    def _stored(self, rows: Float[Array, "n embed"]) -> Any:
        """Rows as the matrix keeps its own."""
        rows = rows.astype(self.weight.get_value().dtype)
        return rows if self.quant is None else quantize(rows, self.quant)

    def train_rows(self, ids: Int[Array, " n"], rows: Float[Array, "n embed"]) -> None:
        """Lets `rows` stand for the rows of `ids` (each once) from now on, trained; in place."""
        self.token_ids, self.token_rows = FrozenParam(ids), TrainedParam(rows)

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch embed"]:
        """The rows of `ids`, in the weight's dtype. Ids outside the vocabulary give NaN."""
        weight = self.weight.get_value()
        if isinstance(weight, QuantizedTensor):
            found = take_rows(weight, ids).dequantize(implementation="xla")
        else:
            found = jnp.take(weight, ids, axis=0, mode="fill")
        if self.token_ids is None or self.token_rows is None:
            return found
        hit = ids[..., None] == self.token_ids[...]
        trained = jnp.take(self.token_rows[...].astype(found.dtype), hit.argmax(-1), axis=0)
        return jnp.where(hit.any(-1, keepdims=True), trained, found)

    def attend(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Scores of every token, float32: `x · Wᵀ` with x's dtype going in."""
        weight = self.weight.get_value()
        if isinstance(weight, QuantizedTensor):
            scores = row_scores(x, weight)
        else:
            scores = _scores(x, weight.astype(x.dtype))
        if self.token_ids is None or self.token_rows is None:
            return scores
        trained = _scores(x, self.token_rows[...].astype(x.dtype))
        return scores.at[..., self.token_ids[...]].set(trained)


@jax.custom_vjp
def _scores(x: Array, weight: Array) -> Array:
    return jnp.einsum("...e,ve->...v", x, weight, preferred_element_type=jnp.float32)


def _scores_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _scores(x, weight), (x, weight)


def _scores_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    # Left alone, autodiff would multiply the float32 gradient: with a 16-bit head that is a float32
    # copy of the largest matrix there is, off the tensor cores.
    x, weight = residuals
    narrow = gradient.astype(x.dtype)
    to_x = jnp.einsum("...v,ve->...e", narrow, weight).astype(x.dtype)
    return to_x, jnp.einsum("...v,...e->ve", narrow, x).astype(weight.dtype)


_scores.defvjp(_scores_forward, _scores_backward)
