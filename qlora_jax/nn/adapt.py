"""What is trained in a module: adapters on the layers that a `LoraConfig` names, and the weights of
the base that it has trained whole.

    add_lora(model, LoraConfig(target_modules=("q", "v"), modules_to_save=("head",)), rngs=rngs)
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

A module's name is its dotted path in the tree, or, where the caller has other ones (a checkpoint's,
one for each layer of a stack), those.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from qlora_jax.nn.checks import check_rngs
from qlora_jax.nn.convert import LINEAR, children, frozen_dense, listed, replace_layers
from qlora_jax.nn.dense import Factors, QuantDense
from qlora_jax.nn.lora import LoraConfig
from qlora_jax.nn.variables import FrozenParam, TrainedParam, trained
from qlora_jax.quant import QuantizedTensor

Names = Mapping[str, Sequence[str]]
Starts = Mapping[str, Factors]


def add_lora(
    module: nnx.Module,
    lora: LoraConfig = LoraConfig(),
    *,
    rngs: nnx.Rngs,
    names: Names | None = None,
    starts: Starts | None = None,
    place: Callable[[nnx.Module], None] | None = None,
) -> nnx.Module:
    """Makes trainable what a `LoraConfig` names: `QuantDense` layers get adapters, modules to save
    and biases become `TrainedParam`.

    An `nnx.Linear` or `nnx.LinearGeneral` that is named is first frozen, unquantized. Dropout draws
    from a stream of each layer's own, seeded from `rngs`, in training mode (`module.train()`);
    stacks, and modules with `names`, take explicit keys alone.

    Args:
        module: changed in place.
        lora: what to adapt, and how.
        rngs: draws A, and the seeds of dropout.
        names: tree path of a module → what `lora` is to call it: one name, or one for each layer of
            a stack; None calls every module by its tree path.
        starts: by name, A and B to start from (`start_from_weight`).
        place: called with each layer once it has its adapter, to move that to where it belongs.

    Returns:
        The same module.

    Raises:
        ValueError: no layer has such a name (the message lists the ones there are), or one has
            adapters already, which would be lost; a start from the weight is asked for but not
            given; a module to save is quantized, or is only a part of a stack. No layer has got an
            adapter then, so that the call may be mended and made again.
        TypeError: rngs is no nnx.Rngs.
    """
    check_rngs(rngs)
    called = {} if names is None else names
    seen: list[str] = []
    chosen: list[tuple[QuantDense, list[LoraConfig | None], list[Factors | None] | None]] = []

    def freeze(path: str, linear: nnx.Linear | nnx.LinearGeneral) -> nnx.Module:
        if lora.targets(path):
            return frozen_dense(path, linear, None)
        seen.append(path)
        return linear

    def choose(path: str, layer: QuantDense) -> nnx.Module:
        own = _names_of(path, layer, called)
        seen.extend(own)
        configs = [lora.at(name) for name in own]
        if any(configs):
            start = None
            if lora.init_lora_weights in ("loftq", "pissa"):
                start = [
                    _start(name, config, lora, starts)
                    for name, config in zip(own, configs, strict=True)
                ]
            chosen.append((layer, configs, start))
        return layer

    _refuse_adapted(module, lora, called)
    replace_layers(module, LINEAR, freeze)
    replace_layers(module, QuantDense, choose)
    if not chosen:
        raise ValueError(
            f"{lora.told_targets}, which names no linear layer of "
            f"{type(module).__name__}; it has {listed(seen)}"
        )
    # Before any layer has an adapter: a module that is refused may be given again.
    _train_whole(module, lora, called)
    for layer, configs, start in chosen:
        layer.adapt(configs, rngs, rngs if names is None else None, start)
        if place is not None:
            place(layer)
    return module


def _refuse_adapted(module: nnx.Module, lora: LoraConfig, called: Names) -> None:
    for path, node in _modules(module, "", set()):
        if not isinstance(node, QuantDense) or node.lora is None:
            continue
        if any(lora.targets(name) for name in _names_of(path, node, called)):
            raise ValueError(
                f"{path} has adapters already, which new ones would replace: leave it out of "
                "target_modules, or build the model with lora=None"
            )


def _names_of(path: str, layer: QuantDense, called: Names) -> Sequence[str]:
    count = math.prod(layer.stack_shape)
    own = called.get(path, [path] * count)
    if len(own) != count:
        raise ValueError(f"{path} is a stack of {count} layers, but has {len(own)} names")
    return own


def _start(
    name: str, config: LoraConfig | None, lora: LoraConfig, starts: Starts | None
) -> Factors | None:
    if config is None:
        return None
    if starts is None or name not in starts:
        raise ValueError(
            f"init_lora_weights is {lora.init_lora_weights!r}, which starts from the original "
            f"weight of {name}, but only the stored one is there: give this configuration to "
            "load_pretrained, on a 16-bit checkpoint"
        )
    return starts[name]


def _train_whole(module: nnx.Module, lora: LoraConfig, called: Names) -> None:
    """Turns what `modules_to_save` and `bias` name from frozen into trained, in place."""
    if lora.modules_to_save is None and lora.bias == "none":
        return
    modules: list[str] = []
    found: list[tuple[nnx.Module, str, TrainedParam]] = []
    saved = False
    for path, node in _modules(module, "", set()):
        own = called.get(path, [path])
        modules.extend(own)
        chosen = {lora.saves(name) for name in own}
        if len(chosen) == 2:
            raise ValueError(
                f"modules_to_save is {lora.modules_to_save!r}, which names some layers of the "
                f"stack {path} but not others: name all of them or none"
            )
        whole = chosen == {True}
        for name, variable in list(vars(node).items()):
            if whole and isinstance(variable, TrainedParam):
                saved = True
            frozen = isinstance(variable, FrozenParam) or type(variable) is nnx.Param
            if not frozen or name in ("row_squares", "lora_scaling"):
                continue
            if whole or (name == "bias" and _bias_trained(node, lora, path, own)):
                saved = saved or whole
                found.append((node, name, _trained(variable, f"{path}.{name}")))
    if lora.modules_to_save and not saved:
        raise ValueError(
            f"modules_to_save is {lora.modules_to_save!r}, which names no module of "
            f"{type(module).__name__}; it has {listed(modules)}"
        )
    for node, name, variable in found:
        setattr(node, name, variable)


def _bias_trained(node: nnx.Module, lora: LoraConfig, path: str, own: Sequence[str]) -> bool:
    if lora.bias != "lora_only":
        return lora.bias == "all"
    adapted = [lora.at(name) is not None for name in own]
    if not isinstance(node, QuantDense) or not any(adapted):
        return False
    if not all(adapted):
        raise ValueError(
            f"bias is 'lora_only', but only some layers of the stack {path} are adapted: adapt all "
            "of them, or use bias='none' or 'all'"
        )
    return True


def _trained(variable: nnx.Variable, path: str) -> TrainedParam:
    value = variable.get_value()
    if isinstance(value, QuantizedTensor):
        raise ValueError(
            f"{path} is quantized, and codes cannot be trained: leave it out of modules_to_save, "
            "or keep it dense"
        )
    return trained(value)


def _modules(node: Any, path: str, visited: set[int]) -> Iterator[tuple[str, nnx.Module]]:
    """Every module with its tree path, each once."""
    if id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, nnx.Module) and path:
        yield path, node
    for name, child in list(children(node)):
        if isinstance(child, (nnx.Module, list, tuple, dict, nnx.List, nnx.Dict)):
            yield from _modules(child, f"{path}.{name}" if path else str(name), visited)
