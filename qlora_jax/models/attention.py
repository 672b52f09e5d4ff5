"""Attention: one function that mixes values by scores, and the layer around it.

`attend` is the one place where scores become weights. What a family asks of it (grouped heads,
windows, soft caps, biases, packed segments) is an argument, and so is the implementation.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from qlora_jax.models.chunked_attention import BLOCK, chunked_attention
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.norm import norm_for
from qlora_jax.models.rope import rotate
from qlora_jax.nn import QuantDense

AttentionName = Literal["xla", "cudnn", "chunked"]

LONG = 2 * BLOCK
"""Sequences above this take "chunked" rather than "xla": what they would hold are scores of 4 MiB
and more a head."""


def check_attention(attention: str, *, biased: bool = False) -> None:
    """Refuses an implementation of attention that is not there.

    Args:
        attention: what was asked for.
        biased: whether scores get a bias, which cuDNN's backward pass does not take.

    Raises:
        ValueError: saying what there is to choose from.
    """
    known = [name for name in get_args(AttentionName) if not (biased and name == "cudnn")]
    if attention not in known:
        why = ": cuDNN's backward pass takes no position biases" if attention == "cudnn" else ""
        raise ValueError(
            f"attention is {attention!r}, but one of {', '.join(known)} is needed{why}."
        )


APART = 4
"""Query heads of a group, at most, whose products with one query are taken one by one on a GPU.
Counted in the SASS of such kernels for an H200: four take 8 µs of 4096 slots and 8 groups, eight
15; the copy that they save, 34 MB of traffic, takes about 8."""


# Query, key and value of a layer in; their mixture out, and whatever the caller keeps of them.
Mix = Callable[[Array, Array, Array], tuple[Array, Any]]


def attend(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys groups dim"],
    value: Float[Array, "batch keys groups dim"],
    *,
    mask: Bool[Array, "#batch #heads #queries keys"] | None = None,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Float[Array, "#batch #heads #queries keys"] | None = None,
    segments: tuple[Int[Array, "batch queries"], Int[Array, "batch keys"]] | None = None,
    implementation: AttentionName,
) -> Float[Array, "batch queries heads dim"]:
    """softmax(scale · q · kᵀ + bias) · v with grouped heads (arXiv 2305.13245), in query's dtype.

    Args:
        query: heads are a multiple of the key's.
        key, value: one head for every `heads / groups` query heads.
        mask: true where a query may see a key. A query that sees none gives numbers of no meaning,
            never NaN.
        causal: query i sees keys 0..i only.
        window: of those, the last so many, key i among them; needs `causal`.
        scale: None for 1 / √dim.
        softcap: scores become c · tanh(score / c) before the bias (arXiv 2408.00118).
        bias: added to the scores.
        segments: ids of the queries and keys of packed sequences: equal ones see each other.
        implementation: "xla" holds all scores and takes everything; "cudnn" is linear in memory
            where there is no bias, and knows no soft cap; "chunked" takes everything and is linear
            in memory (`chunked_attention.py`). A mask or segments cuDNN would need for all pairs,
            so above `LONG` queries "cudnn" with either is run as "chunked". The scores of one query
            (a step of decoding) are few: there is nothing to fuse or to cut.

    Raises:
        ValueError: a window without causality, or a soft cap under cuDNN.
    """
    if window is not None and not causal:
        raise ValueError(f"window is {window} without causal=True: give both, or mask the scores.")
    masked = mask is not None or segments is not None
    too_long = query.shape[1] > LONG and masked and bias is None and softcap is None
    one = query.shape[1] == 1
    if not one and (implementation == "chunked" or (implementation == "cudnn" and too_long)):
        return chunked_attention(
            query,
            key,
            value,
            mask=mask,
            causal=causal,
            window=window,
            scale=scale,
            softcap=softcap,
            bias=bias,
            segments=segments,
        )
    if segments is not None:
        own = segments[0][:, None, :, None] == segments[1][:, None, None, :]
        mask = own if mask is None else own & mask
    if softcap is not None and implementation == "cudnn":
        raise ValueError(
            f"attention is {implementation!r}, which has no soft cap: give attention='xla' or "
            "'chunked'."
        )
    if softcap is not None or (one and (implementation != "xla" or query.dtype == jnp.float16)):
        mask = _visible(query.shape[1], key.shape[1], mask, causal, window)
        apart = one and query.shape[2] <= APART * key.shape[2]
        return _plain(query, key, value, mask, scale, softcap, bias, apart=apart)
    if mask is not None and implementation == "cudnn":
        # cuDNN broadcasts a mask over batch and heads, but not over queries.
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1]))
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        is_causal=causal,
        scale=scale,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn" if implementation == "cudnn" else "xla",
    )


def _visible(
    queries: int, keys: int, mask: Array | None, causal: bool, window: int | None
) -> Array | None:
    """The mask with causality and window in it."""
    ahead = jnp.arange(queries)[:, None] - jnp.arange(keys)[None, :]
    if causal:
        seen = ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)
        mask = seen[None, None] if mask is None else seen & mask
    return mask


def _plain(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    scale: float | None,
    softcap: float | None,
    bias: Array | None,
    *,
    apart: bool,
) -> Array:
    """What `jax.nn.dot_product_attention` computes, with a soft cap, and by products that XLA has
    everywhere. That function asks by name for 16-bit products which XLA lacks in places: bfloat16
    below compute capability 8.0, float16 on a CPU, and for one query on any GPU.

    `apart`, for one query, takes the products of a group's heads one by one on a GPU. XLA makes
    sums of such products and fuses them into one kernel, which reads a layer's keys where they lie
    in the cache. For a product of several rows it copies them first: read, write, read again.
    """
    batch, queries, heads, dim = query.shape
    groups = key.shape[2]

    def grouped(x: Array) -> Array:
        shape = (x.shape[0], 1, 1) if x.shape[1] == 1 else (x.shape[0], groups, heads // groups)
        return x.reshape(*shape, *x.shape[2:])

    query = query.reshape(batch, queries, groups, heads // groups, dim)
    scores = _of_heads("bqkd,bskd->bkqs", query, key, axis=3, out=2, apart=apart, dtype=jnp.float32)
    scores = scores * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + grouped(bias)
    if mask is not None:
        scores = jnp.where(grouped(mask), scores, -0.7 * jnp.finfo(jnp.float32).max)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = _of_heads(
        "bkqs,bskd->bqkd", weights, value, axis=2, out=3, apart=apart, dtype=value.dtype
    )
    return mixed.reshape(batch, queries, heads, dim)


def _of_heads(
    spec: str, heads: Array, shared: Array, *, axis: int, out: int, apart: bool, dtype: Any
) -> Array:
    """Products of each of a group's heads, along `axis`, with what the group shares; their axis in
    the result is `out`."""
    product = functools.partial(jnp.einsum, spec, preferred_element_type=dtype)
    together = jax.vmap(product, in_axes=(axis, None), out_axes=out)
    if not apart:
        return together(heads, shared)

    def one_by_one(heads: Array, shared: Array) -> Array:
        products = [product(head, shared) for head in jnp.unstack(heads, axis=axis)]
        # Or XLA takes one of them into the kernel that puts them beside one another.
        return jnp.stack(jax.lax.optimization_barrier(products), axis=out)

    return jax.lax.platform_dependent(heads, shared, cuda=one_by_one, default=together)


class Attention(nnx.Module):
    """Projects to heads, turns them by their positions, mixes them, projects back."""

    def __init__(self, config: DecoderConfig, dense: Callable[..., QuantDense]) -> None:
        """`dense` makes a linear layer (`Storage.dense`)."""
        for name, linear in config.attention_linears.items():
            made = dense(name, linear.inputs, linear.outputs, use_bias=linear.bias)
            setattr(self, name, made)
        if config.qk_norm:
            queries, keys = (
                (config.num_attention_heads, config.num_key_value_heads)
                if config.qk_norm == "all"
                else (1, 1)
            )
            self.q_norm = norm_for(config, queries * config.head_dim)
            self.k_norm = norm_for(config, keys * config.head_dim)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        turns: tuple[Array, Array] | None,
        mix: Mix,
        *,
        dropout_keys: Mapping[str, Key[Array, ""] | None],
    ) -> tuple[Float[Array, "batch seq embed"], Any]:
        """The same shape and dtype as x, and what `mix` kept.

        Args:
            x: the layer's input, normalised.
            turns: cos, sin of the positions; None where positions are learned.
            mix: `attend` with the caller's masks; queries, keys and values are `[batch, seq,
                heads, head_dim]`.
            dropout_keys: one a projection, by its name.
        """
        query, key, value = self._heads(x, dropout_keys)
        if self.config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        elif self.config.qk_norm == "all":
            query, key = _as_one(self.q_norm, query), _as_one(self.k_norm, key)
        if turns is not None:
            query, key = rotate(query, *turns), rotate(key, *turns)
        mixed, kept = mix(query, key, value)
        out = self.config.names.o
        mixed = mixed.reshape(*x.shape[:2], -1)
        return getattr(self, out)(mixed, dropout_key=dropout_keys[out]), kept

    def _heads(
        self, x: Array, dropout_keys: Mapping[str, Key[Array, ""] | None]
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values, `[batch, seq, heads, head_dim]`."""
        config = self.config

        def project(name: str, width: int) -> Array:
            y = getattr(self, name)(x, dropout_key=dropout_keys[name])
            return y.reshape(*y.shape[:2], -1, width)

        names, width = config.names, config.head_dim
        if config.fused_qkv is None:
            return project(names.q, width), project(names.k, width), project(names.v, width)
        if config.fused_qkv == "heads":
            query, key, value = jnp.split(project(names.qkv, 3 * width), 3, axis=-1)
        else:
            queries, keys = config.num_attention_heads, config.num_key_value_heads
            fused = project(names.qkv, width)
            query, key, value = jnp.split(fused, (queries, queries + keys), axis=2)
        return query, key, value


def _as_one(norm: Callable[[Array], Array], heads: Array) -> Array:
    """The norm of all heads [batch, seq, heads, head_dim] together."""
    return norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)


def capability_here() -> tuple[int, int] | None:
    """The CUDA compute capability of this process's default device; None where it has none."""
    # AMD's GPUs tell another kind of name there.
    told = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(jax.devices()[0], "compute_capability", "")))
    return None if told is None else (int(told[1]), int(told[2]))


def attention_for(
    platform: str,
    compute_dtype: Any,
    head_dim: int,
    *,
    softcap: float | None = None,
    bias: bool = False,
    alibi: bool = False,
    packed: bool = False,
    longest: int | None = None,
    compute_capability: tuple[int, int] | None = None,
) -> AttentionName:
    """The attention to ask for: the fastest that is linear in memory where that matters.

    | the target | and the case | asks for | because |
    |---|---|---|---|
    | CUDA, capability 8.0 on | what cuDNN takes | cudnn | linear in memory, and the fastest |
    | CUDA below 8.0 | any | chunked | XLA has no bfloat16 product there that "xla" asks for |
    | CPU | in float16 | chunked | nor a float16 one there |
    | any other | with a bias on the scores | xla | the bias is as large as they are |
    | | up to `LONG` tokens | xla | all scores are few, and one product is faster than a loop |
    | | more tokens than that | chunked | linear in memory, and takes every case |
    | CUDA, TPU | of unknown length | chunked | a card's memory ends before its user expects it |
    | CPU | of unknown length | xla | as for short ones: memory is what a CPU has most of |

    Args:
        platform: of the *target*, "cpu", "cuda" (or "gpu"), "tpu"; never guessed from this machine,
            which may only be compiling for another.
        compute_dtype: cuDNN takes bfloat16 and float16 only.
        head_dim: cuDNN takes multiples of 8 up to 128.
        softcap: cuDNN takes none (Gemma 2).
        bias: whether scores get one of all pairs, which cuDNN's backward pass does not take (T5).
        alibi: whether they get one of the keys alone, which it does not take either (BLOOM).
        packed: whether rows hold segments, of which cuDNN would need a mask of all pairs.
        longest: tokens of the longest sequence; None where it is unknown.
        compute_capability: of the CUDA target; None where it is new enough. Below 8.0 there is
            neither cuDNN's nor the bfloat16 product that "xla" asks for.
    """
    cuda = platform in ("cuda", "gpu")
    narrow = jnp.dtype(compute_dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    fits = head_dim % 8 == 0 and head_dim <= 128 and softcap is None
    fits = fits and not (bias or alibi or packed)
    old = cuda and compute_capability is not None and compute_capability < (8, 0)
    if cuda and narrow and fits and not old:
        return "cudnn"
    if old or (platform == "cpu" and jnp.dtype(compute_dtype) == jnp.float16):
        return "chunked"
    if bias:
        return "xla"
    if longest is None:
        return "xla" if platform == "cpu" else "chunked"
    return "chunked" if longest > LONG else "xla"
