"""From a checkpoint to a model, quantizing each tensor as it arrives.

    checkpoint → one tensor in host memory → device → quantize → its place in the stacked codes

The model is first built abstractly (shapes alone); every name and shape of the checkpoint is
compared with it, and only then are numbers read, straight into their places (`fill.py`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

from qlora_jax.checkpoints.adapter_parts import check_vocabulary
from qlora_jax.checkpoints.checkpoint import Checkpoint
from qlora_jax.checkpoints.fill import fill
from qlora_jax.checkpoints.matching import keep_dense, matching
from qlora_jax.checkpoints.open import open_checkpoint
from qlora_jax.checkpoints.text_part import text_name
from qlora_jax.models import (
    FAMILIES,
    AttentionName,
    Decoder,
    EncoderClassifier,
    attention_for,
    capability_here,
    family_of,
    module_names,
    shardings_of,
    spread,
    streaming,
    unfreeze,
)
from qlora_jax.models.spread import check_mesh
from qlora_jax.nn import LoraConfig, add_lora, start_from_weight
from qlora_jax.nn.checks import check_dtype, check_matmul
from qlora_jax.nn.lora import SEEDS
from qlora_jax.quant import QuantConfig, QuantizedTensor


def load_model(
    source: str | Path | Checkpoint,
    *,
    quant: QuantConfig | None = QuantConfig(),
    lora: LoraConfig | None = LoraConfig(),
    compute_dtype: Any = jnp.bfloat16,
    param_dtype: Any = None,
    embedding_bits: int | None = None,
    trainable_base: bool = False,
    remat: str = "full",
    stream_weights: bool = False,
    mlp_tile: int | None = None,
    attention: AttentionName | None = None,
    packed: bool = False,
    longest: int | None = None,
    matmul: str | None = None,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    over: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Any:
    """A model from a checkpoint.

    Args:
        source: a path that `open_checkpoint` takes, or what it gave. 4-bit weights are taken over
            byte for byte, and what such a checkpoint holds dense stays dense.
        quant: how the layers' linear weights are stored; None keeps them dense. Of a checkpoint
            in 4 bits it has to be what that holds.
        lora: adapters on them, as new; None for none.
        compute_dtype: dtype of activations and matmuls.
        param_dtype: dtype of embedding, head and dense weights; None means `compute_dtype`, or
            float32 for a trainable base.
        embedding_bits: 8 or 4 keeps embedding and head packed, quantized from the checkpoint's
            numbers a piece of their rows at a time; None keeps them dense. Not of classifiers.
        trainable_base: trains the dense base weights too (see `models.unfreeze`).
        remat: what the backward pass finds saved, one of `models.REMAT`.
        stream_weights: puts the layers' frozen weights into pinned host memory, as they are read,
            and lets them come in layer by layer (`models.streaming`). Decoders only.
        mlp_tile: tokens that an MLP reads at once (`models.tile`); None for all. Decoders only.
        attention: implementation of attention; None lets `models.attention_for` choose one for this
            process's default device, from `packed` and `longest`.
        packed: whether rows will hold several sequences (`data.PackedBatches`).
        longest: tokens of the longest sequence that will be read; None where that is unknown.
        matmul: implementation of the 4-bit matmul; None lets the op choose.
        seed: of the adapters' initial A, and of a head that the checkpoint has not.
        mesh: the devices that the model is spread over as it is read; None for one.
        over: the mesh's axis that weights are cut along (`models.spread`); None gives every device
            all of them.
        overrides: fields of the model's configuration to replace, such as `{"num_labels": 3}`.
        progress: shows a bar on standard error, if that is a terminal.

    Returns:
        The model, its arrays on JAX's default device, or spread over the mesh.

    Raises:
        FileNotFoundError: the folder, its config or a shard is missing.
        ValueError: an unknown architecture, dtype, implementation or field, a damaged file, tensors
            that contradict config.json or hold NaN or infinities where 4-bit codes are needed, or a
            mesh that does not serve.
        TypeError: quant or lora is no configuration, or mesh no mesh.
    """
    _check_kinds(quant, lora, compute_dtype, param_dtype, matmul, seed, mesh, over)
    if trainable_base:
        _check_trainable(quant, embedding_bits)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    family = family_of(checkpoint.config)
    config = family.for_weights(family.read_config(checkpoint.config), checkpoint.tensors)
    config = _replaced(config, overrides or {})
    stored = checkpoint.quant
    if stored is not None and stored != quant:
        raise ValueError(
            f"{checkpoint.source} is quantized already, as {stored}, but quant is {quant}: give "
            f"quant={stored}, or the 16-bit checkpoint."
        )
    if param_dtype is None:
        param_dtype = jnp.float32 if trainable_base else compute_dtype
    switches = _switches(
        family.build,
        checkpoint.source,
        stream_weights=stream_weights,
        mlp_tile=mlp_tile,
        embedding_bits=embedding_bits,
    )
    if attention is None:
        attention = _attention(config, compute_dtype, packed, longest)

    def build(key: Key[Array, ""]) -> Any:
        return family.build(
            config,
            quant=quant,
            compute_dtype=compute_dtype,
            param_dtype=param_dtype,
            remat=remat,
            attention=attention,
            matmul=matmul,
            rngs=nnx.Rngs(params=key),
            **switches,
        )

    key = jax.random.key(seed)
    model = nnx.eval_shape(build, key)
    check_vocabulary(model, lora)
    keep_dense(model, checkpoint, family.weight_names(config), param_dtype)
    if stream_weights:
        needed = streaming.host_bytes(model.layers)
        if mesh is not None:
            # The pool is a process's own, and serves its devices alone.
            parts = 1 if over is None else mesh.shape[over]
            needed = needed * len(mesh.local_devices) // parts
        streaming.check_host_memory_limit(needed, jax.default_backend())
    slots = matching(checkpoint, family, model)
    if jax.tree.leaves(nnx.state(model, nnx.LoRAParam)):
        # Only what is trained is asked for, so the compiler drops the random base. A head that the
        # checkpoint has is then read over it.
        trained = jax.jit(lambda key: nnx.state(build(key), nnx.LoRAParam))
        nnx.update(model, trained(key))
    starts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    quantized_here = None if stored is not None else quant
    prepare = _preparation(lora, quantized_here, starts)
    places = {} if mesh is None else shardings_of(model, mesh, over=over)
    fill(model, checkpoint, slots, quantized_here, prepare, progress, stream_weights, places)
    place = None if mesh is None else functools.partial(spread, mesh=mesh, over=over)
    if lora is not None:
        # Adapters come last: some are made from the weights. Layers are called as in a text model,
        # also where the checkpoint is of one that sees.
        names = module_names(FAMILIES[config.model_type].weight_names(config))
        add_lora(model, lora, rngs=nnx.Rngs(params=key), names=names, starts=starts, place=place)
    if place is not None:
        # What was not read: a fresh head.
        place(model)
    if trainable_base:
        unfreeze(model)
    return model


def _check_kinds(
    quant: Any,
    lora: Any,
    compute_dtype: Any,
    param_dtype: Any,
    matmul: str | None,
    seed: Any,
    mesh: Any,
    over: str | None,
) -> None:
    """Refuses what is wrong whatever the checkpoint holds."""
    for name, given, kind in (("quant", quant, QuantConfig), ("lora", lora, LoraConfig)):
        if given is not None and not isinstance(given, kind):
            raise TypeError(f"{name} is {given!r}, but a {kind.__name__} or None is needed.")
    check_dtype("compute_dtype", compute_dtype)
    if param_dtype is not None:
        check_dtype("param_dtype", param_dtype)
    check_matmul("matmul", matmul)
    if mesh is not None:
        check_mesh(mesh)
    if not isinstance(seed, Integral) or int(seed) not in SEEDS:
        raise ValueError(f"seed is {seed!r}, but a whole number from 0 to {SEEDS[-1]} is needed.")
    if over is not None and mesh is None:
        raise ValueError(f"over is {over!r}, but names an axis of a mesh: give mesh=, too.")


def _check_trainable(quant: QuantConfig | None, embedding_bits: int | None) -> None:
    """Refuses codes in a base that is to be trained."""
    for name, given in (("quant", quant), ("embedding_bits", embedding_bits)):
        if given is not None:
            raise ValueError(
                f"trainable_base is set together with {name}={given}, but codes cannot be trained: "
                f"give {name}=None."
            )


def _replaced(config: Any, overrides: Mapping[str, Any]) -> Any:
    """A model's configuration with some fields replaced."""
    fields = [field.name for field in dataclasses.fields(config)]
    unknown = next((name for name in overrides if name not in fields), None)
    if unknown is not None:
        raise ValueError(
            f"overrides has {unknown!r}, which is no field of {type(config).__name__}: give some "
            f"of {', '.join(fields)}."
        )
    return dataclasses.replace(config, **overrides)


def _switches(build: type, source: Path, **switches: Any) -> dict[str, Any]:
    """Those that are on, as arguments of `build`; refuses those that it does not have."""
    # Not all that is false: `mlp_tile=0` is refused where it is used.
    on = {name: value for name, value in switches.items() if not (value is None or value is False)}
    of_decoders = [name for name in on if name != "embedding_bits"]
    if of_decoders and build is not Decoder:
        raise ValueError(
            f"{' and '.join(of_decoders)} is set, but {source} is a {build.__name__}, and a "
            "Decoder alone has that switch: leave it out."
        )
    if "embedding_bits" in on and build is EncoderClassifier:
        raise ValueError(
            f"embedding_bits is {on['embedding_bits']}, but {source} is an EncoderClassifier, "
            "which has no head over the vocabulary and keeps its embedding dense: leave it out."
        )
    return on


def _attention(config: Any, dtype: Any, packed: bool, longest: int | None) -> AttentionName:
    """The implementation for a model of this configuration on JAX's default device."""
    return attention_for(
        jax.default_backend(),
        dtype,
        config.head_dim,
        softcap=getattr(config, "attn_logit_softcapping", None),
        bias=getattr(config, "score_bias", False),
        alibi=getattr(config, "alibi", False),
        packed=packed,
        longest=longest,
        compute_capability=capability_here(),
    )


def _preparation(
    lora: LoraConfig | None,
    quant: QuantConfig | None,
    starts: dict[str, tuple[np.ndarray, np.ndarray]],
) -> Callable[[str, tuple[str, ...], Any], Any]:
    """(name, path, tensor) → what to store of it: itself, or where an adapter starts from a linear
    layer's weight, the base that this leaves; A and B then go into `starts`, by module."""
    if lora is None or lora.init_lora_weights not in ("loftq", "pissa"):
        return lambda name, path, tensor: tensor

    def prepare(name: str, path: tuple[str, ...], tensor: Any) -> Any:
        module = text_name(name.removesuffix(".weight"))
        own = lora.at(module) if path[-1] == "kernel" else None
        if own is None or isinstance(tensor, QuantizedTensor):
            return tensor
        base, a, b = start_from_weight(jnp.asarray(tensor), quant, own)
        # To the host: on the device those of all layers would lie beside the model.
        starts[module] = jax.device_get((a, b))
        return base

    return prepare
