"""The names of a decoder's tensors in a checkpoint, read off its configuration."""

from collections.abc import Mapping

from qlora_jax.models.config import DecoderConfig, Linear
from qlora_jax.models.family import Slot


def decoder_weights(
    config: DecoderConfig,
    *,
    root: str = "model",
    embedding: str = "embed_tokens",
    layers: str = "layers",
    norm: str = "norm",
    head: str = "lm_head",
    renamed: Mapping[str, str] | None = None,
) -> dict[str, Slot]:
    """Every tensor of a decoder's checkpoint, by its name there.

    Args:
        config: the decoder.
        root: what leads all names but the head's.
        embedding, layers, norm, head: what these are called; a norm of the embedding is called
            after it, with `_layernorm`.
        renamed: our name of a module inside of a layer → the checkpoint's, where they differ.
    """
    names = {f"{root}.{embedding}.weight": Slot(("embed_tokens", "weight"), None)}
    if config.embedding_norm:
        names |= {
            f"{root}.{embedding}_layernorm.{kind}": Slot(("embed_norm", kind), None)
            for kind in _norm(config)
        }
    if config.learned_positions:
        names[f"{root}.embed_positions.weight"] = Slot(("embed_positions", "weight"), None)
    for linear in config.outer_linears:
        names[f"{root}.{linear}.weight"] = Slot((linear, "kernel"), None)
    if config.final_norm:
        names |= {f"{root}.{norm}.{kind}": Slot(("norm", kind), None) for kind in _norm(config)}
    if not config.tie_word_embeddings:
        names[f"{head}.weight"] = Slot(("lm_head", "weight"), None)
    inner = _layer(config)
    for layer in range(config.num_hidden_layers):
        for name, (path, expert) in inner.items():
            module, _, kind = name.rpartition(".")
            theirs = (renamed or {}).get(module, module)
            index = layer if expert is None else (layer, expert)
            names[f"{root}.{layers}.{layer}.{theirs}.{kind}"] = Slot(("layers", *path), index)
    return names


def _norm(config: DecoderConfig) -> tuple[str, ...]:
    """The Variables of a norm."""
    return ("weight", "bias") if config.norm == "layer" else ("weight",)


def _layer(config: DecoderConfig) -> dict[str, tuple[tuple[str, ...], int | None]]:
    """One layer's tensors by their usual names: paths from the layer down, and the expert."""
    attention, mlp = config.names.attention, config.names.mlp
    found: dict[str, tuple[tuple[str, ...], int | None]] = {}

    def linears(
        shapes: Mapping[str, Linear], block: str, path: tuple[str, ...], expert: int | None = None
    ) -> None:
        for name, shape in shapes.items():
            found[f"{block}.{name}.weight"] = ((*path, name, "kernel"), expert)
            if shape.bias:
                found[f"{block}.{name}.bias"] = ((*path, name, "bias"), expert)

    norms: list[tuple[str, ...]] = [(name,) for name in config.layer_norms]
    if config.qk_norm:
        norms += [(attention, "q_norm"), (attention, "k_norm")]
    for path in norms:
        found |= {".".join((*path, kind)): ((*path, kind), None) for kind in _norm(config)}
    linears(config.attention_linears, attention, (attention,))
    if not config.num_local_experts:
        linears(config.mlp_linears, mlp, (mlp,))
        return found
    found[f"{mlp}.gate.weight"] = ((mlp, "gate"), None)
    for expert in range(config.num_local_experts):
        block = f"{mlp}.experts.{expert}"
        linears(config.mlp_linears, block, (mlp, "experts"), expert)
    return found
