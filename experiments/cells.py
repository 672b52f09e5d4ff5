"""From a sweep's file to its cells: datasets × models × any option × seeds.

    name: embedded
    models: [stdlib-1m, stdlib-4m]          # names, paths, hub names; or label: section
    datasets: [describe, implement]         # likewise
    seeds: [0, 1]
    axes:                                   # any option, or named sets of options
      lora.r: [8, 64]
      method: {QLoRA: {}, LoRA-16: {quant: null}}
    rules:                                  # options that hold for some cells only
      - {when: {model: stdlib-4m}, set: {train.learning_rate: 1e-3}}
    train: {steps: 100}                     # sections as in a single run's file: for every cell
    lora: {alpha: 16}

What wins where several say something, from weakest to strongest: the defaults, the file's
sections, a model's or dataset's own section, the rules in their order, `--set`, the axes. A cell's
model, dataset and seed are those that it is called by, and nothing else sets them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import RunConfig, build_run, named_source
from experiments.embedded import DATASETS, MODELS
from experiments.tree import Tree, convert, merged, option_names, unknown_key, with_setting

LISTS = ("name", "models", "datasets", "seeds", "axes", "rules")

_LISTED = {
    "model": "models",
    "model.source": "models",
    "data": "datasets",
    "data.source": "datasets",
    "train.seed": "seeds",
}
"""Options that a list of the sweep sets in every cell."""

# Models and datasets by label, seeds, axes → label → options.
_Lists = tuple[dict[str, Any], dict[str, Any], list[Any], dict[str, dict[str, Tree]]]
# The labels by axis that a rule is for, and its options.
_Rule = tuple[dict[str, set[str]], Tree]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        labels: what tells it from the other cells, as text: dataset, model, each axis, seed.
        run: its configuration.
        own_lora: options of `lora` that the sweep sets, whatever the model's kind would have.
    """

    labels: Mapping[str, str]
    run: RunConfig
    own_lora: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Its folder's name: the labels, in characters that every file system takes."""
        parts = [
            f"seed{value}" if axis == "seed" else f"{axis}={value}" if "." in axis else value
            for axis, value in self.labels.items()
        ]
        return "--".join(re.sub(r"[^\w.=+-]+", "-", part).strip("-.") for part in parts)

    @property
    def variant(self) -> str:
        """The labels beside dataset, model and seed: what is compared within one of a matrix."""
        own = {k: v for k, v in self.labels.items() if k not in ("dataset", "model", "seed")}
        if not own:
            return "16-bit LoRA" if self.run.quant is None else f"QLoRA {self.run.quant.quant_type}"
        return ", ".join(f"{k}={v}" if "." in k else v for k, v in own.items())


@dataclass(frozen=True)
class Sweep:
    """A named list of cells."""

    name: str
    cells: tuple[Cell, ...]


def build_sweep(
    tree: Tree,
    where: str,
    settings: Mapping[str, Any] | None = None,
    file: Tree | None = None,
) -> Sweep:
    """The sweep that a file describes.

    Args:
        tree: the file's content.
        where: what to call it in a message.
        settings: dotted options from the command line, which win over everything but the axes.
        file: the content before the command line's lists took the place of the file's: a rule is
            for a label of one or the other. None: rules may be for what is not there.

    Raises:
        ValueError: an unknown key or axis, an empty list, two cells that cannot be told apart, a
            rule about a label that no list has.
    """
    sections = option_names(RunConfig)
    for key in tree:
        if key not in LISTS and key not in sections:
            raise unknown_key(str(key), [*LISTS, *sections], "", where)
    base = {key: value for key, value in tree.items() if key in sections}
    for key in ("lora", "train"):
        _section(base.get(key), key, where)
    name = str(tree.get("name") or Path(where).stem)
    if name != Path(name).name or name == "..":
        raise ValueError(f"name in {where} is {name!r}, but a folder in runs/ is called by it.")
    models, datasets, seeds, axes = lists = _lists(tree, where)
    rules = _rules(tree.get("rules") or [], ["dataset", "model", "seed", *axes], where)
    if file is not None:
        _check_labels(rules, [lists, _lists(file, where)], where)

    _refuse_idle(settings or {}, axes, rules)
    cells: dict[str, Cell] = {}
    choices = [list(axis.items()) for axis in axes.values()]
    for (data_name, data), (model_name, model), *picked, seed in itertools.product(
        datasets.items(), models.items(), *choices, seeds
    ):
        labels = {"dataset": data_name, "model": model_name}
        labels |= {axis: label for axis, (label, _) in zip(axes, picked, strict=True)}
        labels["seed"] = str(seed)
        own = _with_source(base, "data", DATASETS, data, where)
        own = _with_source(own, "model", MODELS, model, where)
        for condition, options in rules:
            if all(labels[key] in values for key, values in condition.items()):
                own = _with_all(own, options)
        own = _with_all(own, settings or {})
        for _, options in picked:
            own = _with_all(own, options)
        own = with_setting(own, "train.seed", seed)
        cell = Cell(labels, build_run(own, where), frozenset(own.get("lora") or {}))
        if cell.name in cells:
            raise ValueError(f"{where} makes two cells called {cell.name}: give them other labels.")
        cells[cell.name] = cell
    return Sweep(name, tuple(cells.values()))


def _check_labels(rules: list[_Rule], both: list[_Lists], where: str) -> None:
    """ValueError for a rule about a label that no list has."""
    labels: dict[str, list[str]] = {}
    for models, datasets, seeds, axes in both:
        for key, own in {"dataset": datasets, "model": models, "seed": seeds, **axes}.items():
            labels.setdefault(key, []).extend(map(str, own))
    for condition, _ in rules:
        for key, values in condition.items():
            known = list(dict.fromkeys(labels[key]))
            for value in values.difference(known):
                raise ValueError(
                    f"a rule in {where} is for {key} {value!r}, which no cell is called by: there "
                    f"{'is' if len(known) == 1 else 'are'} {', '.join(known)}."
                )


def _refuse_idle(
    settings: Mapping[str, Any],
    axes: Mapping[str, Mapping[str, Tree]],
    rules: list[_Rule],
) -> None:
    """ValueError for an option that no cell would heed, since a list or an axis sets it."""
    given = [settings, *(options for _, options in rules)]
    for options in [*given, *(own for axis in axes.values() for own in axis.values())]:
        for key, _ in _dotted(dict(options)):
            if key in _LISTED:
                raise ValueError(
                    f"{key} is set, but a sweep's cells have theirs from {_LISTED[key]} "
                    f"(--{_LISTED[key]}): name it there."
                )
    for key, _ in _dotted(dict(settings)):
        for name, axis in axes.items():
            if all(_sets(options, key) for options in axis.values()):
                raise ValueError(
                    f"{key} is set, but the axis {name} sets it in every cell: leave it out, or "
                    f"give --axis {key}=... for other values."
                )


def _sets(options: Tree, key: str) -> bool:
    """Whether dotted options set a key, or a part of what it stands for."""
    return any(option == key or option.startswith(f"{key}.") for option in options)


def _with_all(tree: Tree, options: Mapping[str, Any]) -> Tree:
    for key, value in options.items():
        tree = with_setting(tree, key, value)
    return tree


def _with_source(tree: Tree, section: str, known: Collection[str], source: Any, where: str) -> Tree:
    base = named_source(known, tree.get(section, {}), f"{section} in {where}")
    return {**tree, section: merged(base, named_source(known, source, f"{section} in {where}"))}


def _lists(tree: Tree, where: str) -> _Lists:
    """Models, datasets, seeds and axes; the file of a single run is a sweep of one cell."""
    models = _sources(tree.get("models", [tree.get("model", {})]), MODELS, "models", where)
    datasets = _sources(tree.get("datasets", [tree.get("data", {})]), DATASETS, "datasets", where)
    seeds = tree.get("seeds", [(tree.get("train") or {}).get("seed", 0)])
    if not isinstance(seeds, list) or not seeds:
        raise ValueError(f"seeds in {where} is {seeds!r}, but should be a list such as [0, 1].")
    seeds = [convert(seed, int, "a seed", where) for seed in seeds]
    return models, datasets, seeds, _axes(tree.get("axes") or {}, where)


def _sources(given: Any, known: Collection[str], what: str, where: str) -> dict[str, Any]:
    """Label → name or section."""
    if isinstance(given, dict) and given:
        # An empty or source-less section means the source of the label's own name.
        return {
            str(label): {"source": str(label), **(source or {})}
            if isinstance(source, dict | None)
            else source
            for label, source in given.items()
        }
    if not isinstance(given, list) or not given:
        raise ValueError(
            f"{what} in {where} is {given!r}, but should be a list of names "
            f"({', '.join(known)}), paths or hub names, or a section of label: source."
        )
    sources: dict[str, Any] = {}
    for item in given:
        section = named_source(known, item, f"{what} in {where}")
        section = {"source": next(iter(known)), **section}
        label = _label(section, where)
        if label in sources:
            raise ValueError(
                f"{what} in {where} has two entries called {label}: write label: source."
            )
        sources[label] = section
    return sources


def _label(section: Tree, where: str) -> str:
    if not isinstance(section.get("source"), str):
        raise ValueError(f"an unnamed source in {where} should say its source: {section!r}.")
    return Path(section["source"]).name.split(".json")[0]


def _axes(given: Any, where: str) -> dict[str, dict[str, Tree]]:
    """Axis → label → options that the label stands for."""
    if not isinstance(given, dict):
        raise ValueError(
            f"axes in {where} is {given!r}, but should be a section: option: [values]."
        )
    axes: dict[str, dict[str, Tree]] = {}
    for axis, values in given.items():
        if isinstance(values, list) and values:
            axes[str(axis)] = {_shown(value): {str(axis): value} for value in values}
        elif isinstance(values, dict) and values:
            axes[str(axis)] = {
                str(label): dict(_dotted(_section(options, f"axes.{axis}.{label}", where)))
                for label, options in values.items()
            }
        else:
            raise ValueError(
                f"the axis {axis} in {where} is {values!r}, but should be a list of values, or "
                "label: {option: value}."
            )
    return axes


def _rules(given: Any, keys: list[str], where: str) -> list[_Rule]:
    rules = []
    for rule in given if isinstance(given, list) else [given]:
        if not isinstance(rule, dict) or set(rule) != {"when", "set"}:
            raise ValueError(
                f"a rule in {where} is {rule!r}, but should read {{when: {{model: name}}, "
                "set: {option: value}}."
            )
        condition = {}
        for key, value in _section(rule["when"], "a rule's when", where).items():
            if key not in keys:
                raise unknown_key(str(key), keys, "when", where)
            condition[key] = {_shown(v) for v in (value if isinstance(value, list) else [value])}
        rules.append((condition, dict(_dotted(_section(rule["set"], "a rule's set", where)))))
    return rules


def _section(given: Any, what: str, where: str) -> Tree:
    """Options under their names; none where nothing is given."""
    if isinstance(given, dict) or given is None:
        return {str(key): value for key, value in (given or {}).items()}
    raise ValueError(
        f"{what} in {where} is {given!r}, but should be a section, such as {{train.steps: 100}}."
    )


def _dotted(options: Tree) -> Iterator[tuple[str, Any]]:
    """Options one by one: a section is not put in the place of another, but its options into it.
    An empty one has none, and stands for its defaults; a mapping that is no section is one value.
    """
    sections = option_names(RunConfig)
    for key, value in options.items():
        if isinstance(value, dict) and value and key in sections:
            yield from ((f"{key}.{name}", own) for name, own in value.items())
        else:
            yield key, value


def _shown(value: Any) -> str:
    return (
        "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
