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
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from qlora_jax.models.attention import Attention, AttentionName
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.embedding import Embedding
from qlora_jax.models.mlp import GatedMLP
from qlora_jax.models.norm import RMSNorm
from qlora_jax.models.rope import rotations
from qlora_jax.nn import LoraConfig, QuantDense
from qlora_jax.quant import QuantConfig

REMAT: dict[str, Callable[..., bool] | None] = {
    # Save each layer's input, recompute the layer: least memory, one more forward pass.
    "full": jax.checkpoint_policies.nothing_saveable,
    # Save matmul outputs, recompute what lies between: cheap in time, memory grows with depth.
    "dots": jax.checkpoint_policies.checkpoint_dots,
    # Save everything that the backward pass reads.
    "none": None,
}


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
