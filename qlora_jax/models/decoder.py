"""The decoder-only transformer: one file for every family, differences are configuration.

The architecture is Llama's (arXiv 2302.13971): RMSNorm before each half of a layer, rotary
positions (`rope.py`), grouped-query attention (arXiv 2305.13245), SwiGLU. Linear layers are
`nn.QuantDense`, so that the same module is a 4-bit base with adapters, a 16-bit one with adapters,
or a plain model.

How to think of it:

- **Layers are stacked.** `decoder.layers` is one `DecoderLayer` whose every Variable carries a
  leading axis of `num_hidden_layers`; the forward pass is one `jax.lax.scan` along it. So the
  program is as long for 80 layers as for 2, and compiles as fast.
- **Nothing outlives its layer but its input.** With `remat="full"` the backward pass recomputes a
  layer from what entered it; a frozen weight is held as packed codes and never as a residual.
- **Names are Hugging Face's** (`layers.self_attn.q_proj`), so a checkpoint's and an adapter's keys
  are read off the tree (`llama.py`).

`model.hidden(...)` and `model.head(...)` are the two halves of a forward pass; a loss that never
holds all logits at once calls them apart.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from qlora_jax.models.rope import RopeConfig, rotate, rotations
from qlora_jax.nn import FrozenParam, LoraConfig, QuantDense
from qlora_jax.quant import QuantConfig, QuantizedTensor

REMAT: dict[str, Callable[..., bool] | None] = {
    # Save each layer's input, recompute the layer: least memory, one more forward pass.
    "full": jax.checkpoint_policies.nothing_saveable,
    # Save matmul outputs, recompute what lies between: cheap in time, memory grows with depth.
    "dots": jax.checkpoint_policies.checkpoint_dots,
    # Save everything that the backward pass reads.
    "none": None,
}
AttentionName = Literal["xla", "cudnn"]


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; fields are named as in a Hugging Face `config.json`.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        num_hidden_layers: depth.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; divides `num_attention_heads`.
        head_dim: width of a head, even; not always `hidden_size / num_attention_heads`.
        max_position_embeddings: longest sequence that the model was made for, in tokens.
        rms_norm_eps: added to the mean square before the root.
        tie_word_embeddings: whether the head is the embedding itself.
        qkv_bias, o_bias, mlp_bias: which linear layers carry a bias.
        rope: rotary frequencies and their scaling.
        model_type: the family (`families.py`) whose config.json and weight names it is saved by.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    model_type: str = "llama"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, but a positive integer is needed.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, which num_key_value_heads, "
                f"{self.num_key_value_heads}, does not divide: every key head serves equally many "
                "query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, but rotary positions need an even one.")


class RMSNorm(nnx.Module):
    """x / rms(x) · weight over the last axis, in float32, returned as x's dtype (1910.07467)."""

    def __init__(self, size: int, *, eps: float) -> None:
        self.weight = FrozenParam(jnp.ones((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        """The same shape and dtype as x."""
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale * self.weight[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """The vocabulary matrix `[vocab, embed]`: rows on the way in, scores on the way out."""

    def __init__(self, vocab: int, embed: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        init = jax.random.normal(rngs.params(), (vocab, embed), jnp.float32) * 0.02
        self.weight = FrozenParam(init.astype(dtype))

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch embed"]:
        """The rows of `ids`, in the weight's dtype. Ids outside the vocabulary give NaN."""
        return jnp.take(self.weight[...], ids, axis=0, mode="fill")

    def attend(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Scores of every word, float32: `x · Wᵀ` with x's dtype going in."""
        return _scores(x, self.weight[...].astype(x.dtype))


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


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, dense: Callable[..., QuantDense]) -> None:
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = dense("self_attn.q_proj", config.hidden_size, queries, config.qkv_bias)
        self.k_proj = dense("self_attn.k_proj", config.hidden_size, keys, config.qkv_bias)
        self.v_proj = dense("self_attn.v_proj", config.hidden_size, keys, config.qkv_bias)
        self.o_proj = dense("self_attn.o_proj", queries, config.hidden_size, config.o_bias)
        self.head_dim = config.head_dim

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        turns: tuple[Array, Array],
        mask: Bool[Array, "batch 1 1 seq"] | None,
        *,
        implementation: AttentionName,
        dropout_keys: list[Key[Array, ""] | None],
    ) -> Float[Array, "batch seq embed"]:
        """`mask`: true where a key is real; `turns`: cos, sin; one dropout key a projection."""

        def heads(projection: QuantDense, key: Array | None) -> Array:
            y = projection(x, dropout_key=key)
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        query = rotate(heads(self.q_proj, dropout_keys[0]), *turns)
        key = rotate(heads(self.k_proj, dropout_keys[1]), *turns)
        value = heads(self.v_proj, dropout_keys[2])
        if mask is not None and implementation == "cudnn":
            # cuDNN broadcasts a mask over batch and heads, but not over queries.
            mask = jnp.broadcast_to(mask, (mask.shape[0], 1, x.shape[1], x.shape[1]))
        mixed = jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=True, implementation=implementation
        )
        return self.o_proj(mixed.reshape(*x.shape[:2], -1), dropout_key=dropout_keys[3])


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) · up(x)), SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig, dense: Callable[..., QuantDense]) -> None:
        outer, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = dense("mlp.gate_proj", outer, inner, bias)
        self.up_proj = dense("mlp.up_proj", outer, inner, bias)
        self.down_proj = dense("mlp.down_proj", inner, outer, bias)

    def __call__(
        self, x: Float[Array, "batch seq embed"], *, dropout_keys: list[Key[Array, ""] | None]
    ) -> Float[Array, "batch seq embed"]:
        """The same shape and dtype as x; one dropout key a projection."""
        gate = self.gate_proj(x, dropout_key=dropout_keys[0])
        up = self.up_proj(x, dropout_key=dropout_keys[1])
        return self.down_proj(jax.nn.silu(gate) * up, dropout_key=dropout_keys[2])


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, dense: Callable[..., QuantDense]) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, dense)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config, dense)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        turns: tuple[Array, Array],
        mask: Bool[Array, "batch 1 1 seq"] | None,
        *,
        implementation: AttentionName,
        dropout_key: Key[Array, ""] | None,
    ) -> Float[Array, "batch seq embed"]:
        """The same shape and dtype as x; `dropout_key` is this layer's own."""
        keys = [None] * 7 if dropout_key is None else list(jax.random.split(dropout_key, 7))
        x = x + self.self_attn(
            self.input_layernorm(x),
            turns,
            mask,
            implementation=implementation,
            dropout_keys=keys[:4],
        )
        return x + self.mlp(self.post_attention_layernorm(x), dropout_keys=keys[4:])


class Decoder(nnx.Module):
    """A causal language model: token ids in, float32 logits of the next token out.

    Args:
        config: the model's shape.
        quant: how the layers' linear weights are stored; None keeps them dense in `param_dtype`.
        lora: adapters on the layers' linear weights; None for none.
        compute_dtype: dtype of activations and matmuls.
        param_dtype: dtype of embedding, head and dense weights; None means `compute_dtype`.
        remat: one of `REMAT`: what the backward pass finds saved instead of recomputing it.
        attention: implementation of `jax.nn.dot_product_attention`; see `attention_for`.
        matmul: implementation of the 4-bit matmul (`pallas_kernels`); None lets the op choose.
        rngs: stream `params`. Base weights start random.

    `model.remat` and `model.attention` may be set again later; neither changes results beyond
    rounding.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        quant: QuantConfig | None = None,
        lora: LoraConfig | None = None,
        compute_dtype: Any = jnp.float32,
        param_dtype: Any = None,
        remat: str = "full",
        attention: AttentionName = "xla",
        matmul: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        if remat not in REMAT:
            raise ValueError(f"remat is {remat!r}, but one of {', '.join(REMAT)} is needed.")
        if attention not in get_args(AttentionName):
            raise ValueError(f"attention is {attention!r}, but 'xla' or 'cudnn' is needed.")
        self.config = config
        self.compute_dtype = compute_dtype
        self.remat = remat
        self.attention = attention
        stored = param_dtype or compute_dtype

        def make_layer(key: Array) -> DecoderLayer:
            stream = nnx.Rngs(key)

            def dense(name: str, inputs: int, outputs: int, use_bias: bool) -> QuantDense:
                adapted = lora is not None and lora.targets(f"layers.{name}")
                return QuantDense(
                    inputs,
                    outputs,
                    use_bias=use_bias,
                    quant=quant,
                    lora=lora if adapted else None,
                    compute_dtype=compute_dtype,
                    param_dtype=stored,
                    implementation=matmul,
                    rngs=stream,
                )

            return DecoderLayer(config, dense)

        def layer_state(key: Array) -> Any:
            return nnx.state(make_layer(key))

        vocab, embed = config.vocab_size, config.hidden_size
        self.embed_tokens = Embedding(vocab, embed, dtype=stored, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        self.layers = nnx.merge(
            nnx.graphdef(nnx.eval_shape(lambda: make_layer(keys[0]))), jax.vmap(layer_state)(keys)
        )
        if lora is not None and not nnx.state(self.layers, nnx.LoRAParam):
            raise ValueError(
                f"target_modules is {lora.target_modules!r}, which names no linear layer of the "
                "decoder; it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj."
            )
        self.norm = RMSNorm(embed, eps=config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else Embedding(vocab, embed, dtype=stored, rngs=rngs)
        )

    def __call__(
        self,
        input_ids: Int[Array, "batch seq"],
        attention_mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch seq vocab"]:
        """Float32 logits. Arguments as in `hidden`; where the mask is 0 they mean nothing."""
        return self.head(self.hidden(input_ids, attention_mask, positions, dropout_key=dropout_key))

    def hidden(
        self,
        input_ids: Int[Array, "batch seq"],
        attention_mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """What the head reads: the last layer's output, normalised, in `compute_dtype`.

        Args:
            input_ids: int32 token ids.
            attention_mask: nonzero where a token is real, on whichever side the padding lies. Where
                all padding is on the right it can be left out: causality hides it already, and
                attention without a mask is linear in memory under cuDNN.
            positions: of each token; None counts the real tokens from 0.
            dropout_key: turns LoRA dropout on; every layer and module gets its own key from it.
        """
        batch, length = input_ids.shape
        mask = None if attention_mask is None else attention_mask.astype(bool)
        if positions is None:
            if mask is None:
                positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
            else:
                positions = jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)
        turns = rotations(positions, self.config.rope, self.config.head_dim)
        key_mask = None if mask is None else mask[:, None, None, :]
        graphdef, stacked = nnx.split(self.layers)
        keys = (
            None
            if dropout_key is None
            else jax.random.split(dropout_key, self.config.num_hidden_layers)
        )

        def step(x: Array, layer: tuple[Any, Array | None]) -> tuple[Array, None]:
            state, key = layer
            y = nnx.merge(graphdef, state)(
                x, turns, key_mask, implementation=self.attention, dropout_key=key
            )
            return y, None

        policy = REMAT[self.remat]
        if policy is not None:
            # Inside a scan, nothing can be merged with the recomputation across iterations, so the
            # barriers that prevent_cse puts in would only hinder fusion.
            step = jax.checkpoint(step, policy=policy, prevent_cse=False)
        x = self.embed_tokens(input_ids).astype(self.compute_dtype)
        x, _ = jax.lax.scan(step, x, (stacked, keys))
        return self.norm(x)

    def head(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Float32 logits of hidden states."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).attend(hidden)


def attention_for(platform: str, compute_dtype: Any, head_dim: int) -> AttentionName:
    """The attention to ask for: "cudnn" where it is a CUDA target and cuDNN takes the case.

    Args:
        platform: of the *target*, "cpu", "cuda" (or "gpu"), "tpu"; never guessed from this machine,
            which may only be compiling for another.
        compute_dtype: cuDNN takes bfloat16 and float16 only.
        head_dim: cuDNN takes multiples of 8 up to 128.
    """
    narrow = jnp.dtype(compute_dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    fits = head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if platform in ("cuda", "gpu") and narrow and fits else "xla"


def unfreeze(model: nnx.Module) -> None:
    """Makes every dense base weight trainable, in place: each `FrozenParam` becomes an `nnx.Param`.

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
                        "model with quant=None to train its base weights."
                    )
                setattr(node, name, nnx.Param(weight))
