"""Turning anyone's Flax NNX module into a QLoRA one, in place: the base.

    quantize_module(model, QuantConfig())      # every nnx.Linear becomes a frozen QuantDense
    add_lora(model, LoraConfig(target_modules=("q", "v")), rngs=nnx.Rngs(0))         # adapt.py
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)     # the adapters | all the rest

A module is found by walking attributes, lists, tuples and dicts; what is not linear is left alone.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from flax import nnx

from qlora_jax.nn.checks import check_dtype, check_matmul
from qlora_jax.nn.dense import QuantDense
from qlora_jax.nn.dense_general import QuantDenseGeneral
from qlora_jax.quant import QuantConfig, QuantizedTensor

LINEAR = (nnx.Linear, nnx.LinearGeneral)
"""The layers that a `QuantDense` takes the place of."""

_PRODUCT = (
    "dot_general",
    "dot_general_cls",
    "precision",
    "preferred_element_type",
    "promote_dtype",
)
"""What may be set in such a layer that a product through packed codes does not carry out."""


def quantize_module(
    module: nnx.Module,
    config: QuantConfig | None = QuantConfig(),
    *,
    skip: Sequence[str] = (),
    compute_dtype: Any = None,
    implementation: str | None = None,
) -> nnx.Module:
    """Replaces every `nnx.Linear` inside a module by a frozen `QuantDense`, and every
    `nnx.LinearGeneral` by a `QuantDenseGeneral`.

    Args:
        module: changed in place; must not be a linear layer itself.
        config: how weights are stored; None freezes them unquantized (16-bit LoRA).
        skip: layers to leave as they are, by the last part of their path or by the whole path.
        compute_dtype: of the new layers; None keeps each layer's own dtype.
        implementation: which kernel multiplies.

    Returns:
        The same module.

    Raises:
        ValueError: there is no linear layer to replace, or one computes something else (it is of
            a subclass that has a `__call__` of its own, as `nnx.LoRALinear`, or has a `dot_general`
            or `precision` of its own); a layer has adapters already, on a weight that is not
            quantized; a name in `skip` is no linear layer's, or there is no such dtype or
            implementation. The module is as it was.
    """
    if compute_dtype is not None:
        check_dtype("compute_dtype", compute_dtype)
    check_matmul("implementation", implementation)
    linears = _layers(module, LINEAR)
    if not linears:
        raise ValueError(
            f"{type(module).__name__} holds no nnx.Linear; nothing to quantize: of a layer itself, "
            "QuantDense.from_weight makes a frozen one; what is a QuantDense already (quantized, "
            "adapted, or of load_pretrained) stays as it is"
        )
    # One name is a sequence of names, too: its letters.
    skipped = {skip} if isinstance(skip, str) else set(skip)
    dense = {
        path
        for path, layer in _layers(module, QuantDense).items()
        if layer.lora is not None and not isinstance(layer.kernel.get_value(), QuantizedTensor)
    }
    known = {name for path in (*linears, *dense) for name in (path, path.rpartition(".")[2])}
    strange = skipped - known
    if strange:
        raise ValueError(
            f"skip names {sorted(strange)[0]!r}, which is no nnx.Linear of "
            f"{type(module).__name__}; it has {listed(linears)}"
        )

    left = {path for path in (*linears, *dense) if skipped & {path, path.rpartition(".")[2]}}
    if config is not None and dense - left:
        raise ValueError(
            f"{min(dense - left)} has adapters on a weight that is not quantized: call "
            "quantize_module before add_lora, or name it in skip"
        )
    for path, linear in linears.items():
        if path not in left:
            _refuse_other_products(path, linear)

    def convert(path: str, linear: nnx.Linear | nnx.LinearGeneral) -> nnx.Module:
        if path in left:
            return linear
        return frozen_dense(path, linear, config, compute_dtype, implementation)

    replace_layers(module, LINEAR, convert)
    return module


def _layers(module: nnx.Module, kind: type | tuple[type, ...]) -> dict[str, Any]:
    """The layers of a type inside a module, by their paths."""
    layers: dict[str, Any] = {}

    def note(path: str, layer: nnx.Module) -> nnx.Module:
        layers[path] = layer
        return layer

    replace_layers(module, kind, note)
    return layers


def frozen_dense(
    path: str,
    linear: nnx.Linear | nnx.LinearGeneral,
    config: QuantConfig | None,
    compute_dtype: Any = None,
    implementation: str | None = None,
) -> QuantDense:
    """The frozen `QuantDense` for the linear layer at a path; arguments as of `quantize_module`.

    Raises:
        ValueError: it computes something else than an `nnx.Linear` or `nnx.LinearGeneral`, or is a
            stack.
    """
    _refuse_other_products(path, linear)
    kernel = linear.kernel.get_value()
    inputs, outputs = _sizes(linear)
    weight = kernel.reshape(math.prod(inputs), math.prod(outputs)).T
    bias = None if linear.bias is None else linear.bias.get_value().reshape(-1)
    options: dict[str, Any] = {
        "quant": config,
        "lora": None,
        "compute_dtype": compute_dtype or linear.dtype or kernel.dtype,
        "implementation": implementation,
        "rngs": nnx.Rngs(0),
    }
    if not isinstance(linear, nnx.LinearGeneral):
        return QuantDense.from_weight(weight, bias, **options)
    return QuantDenseGeneral(
        inputs,
        outputs,
        axis=linear.axis,
        use_bias=bias is not None,
        kernel_init=lambda *_: weight,
        bias_init=lambda *_: bias,
        **options,
    )


def _refuse_other_products(path: str, linear: nnx.Linear | nnx.LinearGeneral) -> None:
    """Refuses a layer that a `QuantDense` would compute otherwise."""
    kind = nnx.LinearGeneral if isinstance(linear, nnx.LinearGeneral) else nnx.Linear
    if type(linear).__call__ is not kind.__call__:
        raise ValueError(
            f"{path} is a {type(linear).__name__}, which has a __call__ of its own that a "
            "QuantDense would not carry out: name it in skip (or leave it out of target_modules), "
            f"or build it around an nnx.{kind.__name__}"
        )
    options = inspect.signature(kind.__init__).parameters
    for name in _PRODUCT:
        if name in options and getattr(linear, name) != options[name].default:
            raise ValueError(
                f"{path} has {name}={getattr(linear, name)!r}, which a QuantDense would not carry "
                f"out: name {path} in skip (or leave it out of target_modules), or set {name} back "
                f"to nnx.{kind.__name__}'s default first"
            )
    shape, (inputs, outputs) = linear.kernel.get_value().shape, _sizes(linear)
    if shape != (*inputs, *outputs):
        raise ValueError(
            f"{path} has a kernel of shape {shape}; {(*inputs, *outputs)} is one matrix: "
            "convert the layer before stacking it with nnx.vmap; skip one that has batch axes"
        )


def _sizes(linear: nnx.Linear | nnx.LinearGeneral) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes that go in and those that come out."""
    inputs, outputs = (
        (size,) if isinstance(size, int) else tuple(size)
        for size in (linear.in_features, linear.out_features)
    )
    return inputs, outputs


def listed(names: Iterable[str]) -> str:
    """Names for a message, those of all layers as one."""
    return ", ".join(sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names})) or "none"


def replace_layers(
    module: Any, kind: type | tuple[type, ...], convert: Callable[[str, Any], nnx.Module]
) -> int:
    """Puts `convert(path, layer)` in the place of each layer of a type; a layer that is used in
    two places stays one layer, and a kernel that two layers share stays one kernel. Returns how
    many layers there were."""
    converted: dict[int, nnx.Module] = {}
    kernels: dict[tuple[int, int], nnx.Variable] = {}
    visited: set[int] = set()

    def replacement(path: str, layer: Any) -> nnx.Module:
        if id(layer) not in converted:
            new: Any = convert(path, layer)
            if new is not layer:
                shared = id(layer.kernel), new.in_features
                new.kernel = kernels.setdefault(shared, new.kernel)
            converted[id(layer)] = new
        return converted[id(layer)]

    def visit(node: Any, path: str) -> None:
        if id(node) not in visited:
            visited.add(id(node))
            replace_children(node, path)

    def replace_children(node: Any, path: str) -> None:
        for name, child in list(children(node)):
            child_path = f"{path}.{name}" if path else str(name)
            if isinstance(child, kind):
                _assign(node, name, replacement(child_path, child))
            elif isinstance(child, tuple):
                # Nothing can be put into a tuple: another one takes its place. The list of its
                # members is gone by the next tuple, which may be given the same id.
                members = list(child)
                replace_children(members, child_path)
                if any(new is not old for new, old in zip(members, child, strict=True)):
                    named = hasattr(child, "_fields")
                    _assign(node, name, type(child)(*members) if named else tuple(members))
            elif isinstance(child, (nnx.Module, list, dict, nnx.List, nnx.Dict)):
                visit(child, child_path)

    visit(module, "")
    return len(converted)


def children(node: Any) -> Iterator[tuple[Any, Any]]:
    """What a module, list or dict holds, by attribute name, index or key."""
    if isinstance(node, dict):
        return iter(node.items())
    if isinstance(node, (list, tuple, nnx.List)):
        return enumerate(node)
    return iter([(k, v) for k, v in vars(node).items() if not k.startswith("_pytree__")])


def _assign(node: Any, name: Any, value: Any) -> None:
    if isinstance(node, (dict, list, nnx.List)):
        node[name] = value
    else:
        setattr(node, name, value)
