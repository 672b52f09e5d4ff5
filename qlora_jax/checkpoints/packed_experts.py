"""Adapters of packed experts, PEFT's `target_parameters`, read as adapters of each expert's layers.

transformers 5 holds the experts of a layer in two parameters, `mlp.experts.gate_up_proj`
[E, 2·inner, embed] and `mlp.experts.down_proj` [E, embed, inner]. PEFT adapts a parameter by one
pair of factors, E times as large; where both are adapted, the second is wrapped around the first:

    mlp.experts.lora_A.weight                 [E·r, in]    r rows of expert 0, then of expert 1 …
    mlp.experts.lora_B.weight                 [out, r·E]   for each rank one column of every expert
    mlp.experts.base_layer.lora_A.weight …    of gate_up_proj, where down_proj's are around it

So expert e has A[e·r : (e + 1)·r] and B[:, e::E]. Of gate_up_proj, the first half of B's rows is
the gate's and the second up's, and A is both's: exact. PEFT before 0.19.1 took these parameters for
[E, in, out] and adapted their transposes: there A is [E·r, out] and B [in, r·E].

Here every expert has layers of its own, named as files name them. `expert_config` says the same in
those names, `expert_cuts` finds their factors in the packed ones.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qlora_jax.checkpoints.text_part import adapted_in
from qlora_jax.models.config import LayerNames, Linear
from qlora_jax.models.families.mixtral import NAMES as MIXTRAL_NAMES
from qlora_jax.nn import LoraConfig
from qlora_jax.nn.targets import by_pattern, named

_A, _B = ".lora_A.weight", ".lora_B.weight"
_EXPERTS, _WRAPPED = "mlp.experts", ".base_layer"
# Parameters in the order in which PEFT wraps them, and the layers that they are made of.
_LAYERS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
# How families call an MLP and its layers; an adapter does not tell which one it is of.
_FAMILIES = (LayerNames(), MIXTRAL_NAMES)
# A parameter's whole name, or an end of it.
_PARAMETER = re.compile(
    r"(?:(?:(?:(?:(?:model\.)?layers\.)?\d+\.)?mlp\.)?experts\.)?(?:gate_up_proj|down_proj)"
)


class _Adapted(NamedTuple):
    """A layer that the file has an adapter of, or the experts' layers of one parameter.

    Attributes:
        root, number: what leads to it, up to its decoder layer's number.
        expression: for what follows, a regular one.
        r, alpha: its own.
    """

    root: str
    number: str
    expression: str
    r: int
    alpha: int | float


def expert_config(config: Mapping[str, Any], path: Path, weights: Path) -> dict[str, Any]:
    """An adapter_config.json with `target_parameters`, in the names of the experts' own layers.

    PEFT chooses parameters by other rules than modules: what leaves modules out, or counts their
    layers, does not count for them, and patterns are held against their packed names. So the
    layers are those that the file has tensors of, each with its rank and alpha. `r` and
    `lora_alpha` become those of a fused gate and up: where PEFT packs again what is saved here, it
    stacks the factors of the two into one pair, and takes twice `r` and `lora_alpha` for that.

    Args:
        config: the file's content, its fields of the right kinds.
        path: of the file.
        weights: the tensors beside it.

    Raises:
        ValueError: a parameter is not the experts', or the tensors' file is damaged.
    """
    targets = tuple(config["target_parameters"])
    other = next((target for target in targets if not _PARAMETER.fullmatch(target)), None)
    if other is not None:
        raise ValueError(
            f"{path} has target_parameters {list(targets)!r}, but of parameters only the experts' "
            f"are read, 'mlp.experts.gate_up_proj' and 'mlp.experts.down_proj', not {other!r}: "
            "train the adapter without it, or merge it in PEFT (merge_and_unload)."
        )
    adapted = list(_adapted(config, targets, weights))
    fused = ((a.r, a.alpha) for a in adapted if a.expression == _expression("gate_up_proj"))
    r, alpha = next(fused, (config["r"], config["lora_alpha"]))
    return dict(config) | {
        "target_parameters": None,
        "target_modules": _paths(adapted),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {
            _paths(a for a in adapted if a.r == own): own
            for own in sorted({a.r for a in adapted} - {r})
        },
        "alpha_pattern": {
            _paths(a for a in adapted if a.alpha == own): own
            for own in sorted({a.alpha for a in adapted} - {alpha})
        },
    }


def _adapted(
    config: Mapping[str, Any], targets: tuple[str, ...], weights: Path
) -> Iterator[_Adapted]:
    """What the file has adapters of, with PEFT's ranks and alphas."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for module in sorted({name.removesuffix(_WRAPPED) for name in adapted_in(weights)}):
        split = re.match(r"(.*?\.)(\d+)\.(.+)", module)
        root, number, rest = ("", "", module) if split is None else split.groups()
        meant = {module: re.escape(rest)}
        if rest == _EXPERTS:
            packed = {f"{module}.{parameter}": _expression(parameter) for parameter in _LAYERS}
            meant = {name: layers for name, layers in packed.items() if named(targets, name)}
        for name, expression in meant.items():
            yield _Adapted(
                root,
                number,
                expression,
                by_pattern(ranks, name, config["r"]),
                by_pattern(alphas, name, config["lora_alpha"]),
            )


def _expression(parameter: str) -> str:
    """The layers that a parameter holds, as a regular expression for their paths in a layer.

    An expert's number may lack: PEFT holds an expression against such paths where it packs again.
    """
    mlps = "|".join(names.mlp for names in _FAMILIES)
    layers = "|".join(getattr(names, f) for f in _LAYERS[parameter] for names in _FAMILIES)
    return rf"(?:{mlps})\.experts\.(?:\d+\.)?(?:{layers})"


def _paths(adapted: Iterable[_Adapted]) -> str:
    """A regular expression for the whole paths of layers: what is in the same decoder layers of the
    same root stands together."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for a in adapted:
        numbers.setdefault((a.root, a.expression), []).append(a.number)
    together: dict[tuple[str, str], list[str]] = {}
    for (root, expression), own in numbers.items():
        ordered = "|".join(sorted(own, key=lambda n: (len(n), n)))
        together.setdefault((root, ordered), []).append(expression)
    return "|".join(
        (rf"{re.escape(root)}(?:{ordered})\." if root else "") + f"(?:{'|'.join(expressions)})"
        for (root, ordered), expressions in together.items()
    )


def plainly_scaled(lora: LoraConfig, modules: Iterable[str]) -> LoraConfig:
    """The same scales without rsLoRA, if some of the adapted modules are experts'.

    PEFT stacks the factors of gate and up into one pair and takes twice their rank and alpha, which
    leaves α / r as it is, and of α / √r makes √2 times as much (0.21.2). It holds patterns against
    the packed names, so an alpha on which all experts agree stands at a pattern that matches them.
    """
    modules = list(modules)
    if not lora.use_rslora or not any(".experts." in module for module in modules):
        return lora
    alphas = {module: own.scaling * own.r for module in modules if (own := lora.at(module))}
    usual = lora.scaling * lora.r
    together: dict[str, set[float]] = {}
    for module, alpha in alphas.items():
        together.setdefault(_packed_too(module), set()).add(alpha)
    other = {
        pattern if len(together[pattern := _packed_too(module)]) == 1 else re.escape(module): alpha
        for module, alpha in alphas.items()
        if alpha != usual
    }
    return replace(lora, alpha=usual, alpha_pattern=other, use_rslora=False)


def _packed_too(module: str) -> str:
    """A regular expression for the path of a layer, and of an expert's for all that are packed into
    one parameter with it."""
    for expression in map(_expression, _LAYERS):
        found = re.fullmatch(rf"(.*\.)?{expression}", module)
        if found is not None:
            return re.escape(found[1] or "") + expression
    return re.escape(module)


class Cut(NamedTuple):
    """One layer's factor: a part of a packed one, or of its transpose.

    Attributes:
        name: of the packed tensor.
        rows, columns: the part of it.
        transposed: whether that is the factor's transpose.
    """

    name: str
    rows: slice
    columns: slice
    transposed: bool

    def of(self, packed: np.ndarray) -> np.ndarray:
        """The factor, a view of the packed tensor."""
        part = packed[self.rows, self.columns]
        return part.T if self.transposed else part


class _Packed(NamedTuple):
    """The adapter of one parameter.

    Attributes:
        a, b: names of its factors.
        module: of the experts, as files call it.
        experts: how many.
        r: of each.
        layers: one expert's.
    """

    a: str
    b: str
    module: str
    experts: int
    r: int
    layers: dict[str, Linear]

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of A and B."""
        factors, inputs = self.experts * self.r, next(iter(self.layers.values())).inputs
        return (factors, inputs), (sum(layer.outputs for layer in self.layers.values()), factors)

    def cuts(self, transposed: bool) -> Iterator[tuple[str, Cut]]:
        """The factors of each expert's layers, by name."""
        first = 0
        for name, layer in self.layers.items():
            outputs = slice(first, first + layer.outputs)
            first = outputs.stop
            for e in range(self.experts):
                rows, columns = slice(e * self.r, (e + 1) * self.r), slice(e, None, self.experts)
                a = Cut(self.a, rows, slice(None), False)
                b = Cut(self.b, outputs, columns, False)
                if transposed:
                    a = Cut(self.b, slice(None), columns, True)
                    b = Cut(self.a, rows, outputs, True)
                yield f"{self.module}.{e}.{name}{_A}", a
                yield f"{self.module}.{e}.{name}{_B}", b


def expert_cuts(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    lora: LoraConfig,
    model: Any,
    version: str | None,
) -> dict[str, Cut]:
    """Where the experts' factors lie in packed ones.

    Args:
        folder: the adapter's.
        shapes: of its tensors, by their names without PEFT's prefix.
        lora: its configuration, as `expert_config` made it.
        model: the configuration of its base.
        version: PEFT's that wrote it, None before 0.18; asked where shapes do not tell the layout.

    Returns:
        By the names that an adapter with a module per expert has; empty where nothing is packed.

    Raises:
        ValueError: a packed factor is of another rank or another base.
    """
    cuts: dict[str, Cut] = {}
    for packed in _packed(shapes, lora, model):
        (a, b), usual = (shapes[packed.a], shapes[packed.b]), packed.shapes
        older = usual[1][::-1], usual[0][::-1]
        if (a, b) not in (usual, older):
            raise ValueError(
                f"{folder}: {packed.a!r} has shape {list(a)} and its B {list(b)}, but "
                f"{packed.experts} experts of rank {packed.r} in this base need {list(usual[0])} "
                f"and {list(usual[1])}: the adapter was trained with another rank or on another "
                "base model."
            )
        transposed = (a, b) == older and (usual != older or _transposes(version))
        cuts |= packed.cuts(transposed)
    return cuts


def _packed(
    shapes: Mapping[str, tuple[int, ...]], lora: LoraConfig, model: Any
) -> Iterator[_Packed]:
    """What the tensors hold of parameters that the configuration adapts, in the base's names."""
    ends = (f".{_EXPERTS}{_A}", f".{_EXPERTS}{_WRAPPED}{_A}")
    stems = {n.removesuffix(_A).removesuffix(_WRAPPED) for n in shapes if n.endswith(ends)}
    experts = getattr(model, "num_local_experts", None) or 0
    for stem in sorted(stems) if experts else ():
        module = f"{stem.removesuffix(_EXPERTS)}{model.names.mlp}.experts"
        adapted = []
        for fields in _LAYERS.values():
            layers = {
                name: model.mlp_linears[name] for name in (getattr(model.names, f) for f in fields)
            }
            own = lora.at(f"{module}.0.{next(iter(layers))}")
            if own is not None:
                adapted.append((own.r, layers))
        wrappers = [f"{stem}{_WRAPPED}", stem][-len(adapted) :]
        for wrapper, (r, layers) in zip(wrappers, adapted, strict=False):
            if {wrapper + _A, wrapper + _B} <= shapes.keys():
                yield _Packed(wrapper + _A, wrapper + _B, module, experts, r, layers)


def _transposes(version: str | None) -> bool:
    """Whether this PEFT adapts the transposes of the experts' parameters."""
    return tuple(map(int, re.findall(r"\d+", str(version or ""))[:3])) < (0, 19, 1)
