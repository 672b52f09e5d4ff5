"""Reading a traced function: what an output depends on, and computing its outputs one by one.

A jaxpr is JAX's record of a function: a list of equations, each with inputs and outputs. `paged`
reads it to make sure that no parameter's update looks at another parameter, and to carry out the
update of one parameter at a time with exactly the equations of the whole; `train.in_backward` reads
it to tell what is known before the backward pass, and whether an update treats every number alone.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex_core


def sources(jaxpr: jex_core.Jaxpr) -> list[frozenset[int]]:
    """For every output of a jaxpr, the inputs that it may depend on (never too few)."""
    reach: dict[Any, frozenset[int]] = {var: frozenset([i]) for i, var in enumerate(jaxpr.invars)}

    def of(var: Any) -> frozenset[int]:
        return frozenset() if isinstance(var, jex_core.Literal) else reach.get(var, frozenset())

    for eqn in jaxpr.eqns:
        into = [of(var) for var in eqn.invars]
        body = _called(eqn)
        if body is None:
            outs = [frozenset[int]().union(*into)] * len(eqn.outvars)
        else:
            outs = [
                frozenset[int]().union(*(into[i] for i in inner)) for inner in sources(body.jaxpr)
            ]
        reach.update(zip(eqn.outvars, outs, strict=True))
    return [of(var) for var in jaxpr.outvars]


def split_early(
    traced: jex_core.ClosedJaxpr, early: list[bool]
) -> tuple[Callable[[list[Any]], list[Any]], Callable[[list[Any], list[Any]], list[Any]]]:
    """A traced function in two: what its early inputs decide alone, and the rest.

    Args:
        traced: the function.
        early: of each input, whether it is known early.

    Returns:
        (before, after), where `after(before(early inputs), late inputs)` is what `traced` returns.
    """
    jaxpr = traced.jaxpr
    consts = dict(zip(jaxpr.constvars, traced.consts, strict=True))
    first = [var for var, yes in zip(jaxpr.invars, early, strict=True) if yes]
    last = [var for var, yes in zip(jaxpr.invars, early, strict=True) if not yes]
    known: set[Any] = {*consts, *first}
    sooner, later = [], []
    for eqn in jaxpr.eqns:
        if all(isinstance(var, jex_core.Literal) or var in known for var in eqn.invars):
            known.update(eqn.outvars)
            sooner.append(eqn)
        else:
            later.append(eqn)
    read = [var for eqn in later for var in eqn.invars] + list(jaxpr.outvars)
    kept = [
        var
        for var in dict.fromkeys(v for v in read if not isinstance(v, jex_core.Literal))
        if var in known and var not in consts
    ]

    def run(eqns: list[Any], values: dict[Any, Any], wanted: list[Any]) -> list[Any]:
        def value(var: Any) -> Any:
            return var.val if isinstance(var, jex_core.Literal) else values[var]

        for eqn in eqns:
            outs = _evaluate(eqn, [value(var) for var in eqn.invars])
            values.update(zip(eqn.outvars, outs, strict=True))
        return [value(var) for var in wanted]

    def before(given: list[Any]) -> list[Any]:
        return run(sooner, consts | dict(zip(first, given, strict=True)), kept)

    def after(decided: list[Any], given: list[Any]) -> list[Any]:
        values = consts | dict(zip(kept, decided, strict=True))
        return run(later, values | dict(zip(last, given, strict=True)), list(jaxpr.outvars))

    return before, after


def is_elementwise(jaxpr: jex_core.Jaxpr, watched: list[bool]) -> bool:
    """Whether all that is computed from the watched inputs keeps their shape on the way.

    A reduction does not, so this finds clipping by norms, trust ratios, factored moments. (What
    mixes numbers of an array and keeps its shape, such as a cumulative sum, is not found.)
    """
    return _touched(jaxpr, watched) is not None


def computes(jaxpr: jex_core.Jaxpr) -> list[str]:
    """The names of all that a traced function computes, in order; moves between memories, and what
    orders them, are left out."""
    names: list[str] = []
    for eqn in jaxpr.eqns:
        body = _called(eqn)
        if body is not None:
            names += computes(body.jaxpr)
        elif eqn.primitive.name not in ("device_put", "optimization_barrier"):
            names.append(eqn.primitive.name)
    return names


def _touched(jaxpr: jex_core.Jaxpr, watched: list[bool]) -> list[bool] | None:
    """Which outputs derive from watched inputs; None where a shape changes on the way."""
    touched = {var for var, is_watched in zip(jaxpr.invars, watched, strict=True) if is_watched}

    def is_touched(var: Any) -> bool:
        return not isinstance(var, jex_core.Literal) and var in touched

    for eqn in jaxpr.eqns:
        into = [is_touched(var) for var in eqn.invars]
        if not any(into):
            continue
        body = _called(eqn)
        if body is None:
            kept = [var for var in eqn.invars if is_touched(var)]
            if len({_shape(var) for var in (*kept, *eqn.outvars)}) > 1:
                return None
            touched.update(eqn.outvars)
        else:
            inner = _touched(body.jaxpr, into)
            if inner is None:
                return None
            touched.update(var for var, yes in zip(eqn.outvars, inner, strict=True) if yes)
    return [is_touched(var) for var in jaxpr.outvars]


class LazyOutputs:
    """A traced function whose outputs are computed one at a time, each equation at most once.

    Calls of jitted functions are opened, so that of a jitted function over many parameters only
    the part that an output needs is computed.

    Attributes:
      inputs: the arguments; an entry may be replaced until an output that needs it is asked for.
    """

    def __init__(self, traced: jex_core.ClosedJaxpr, inputs: list[Any]):
        self.inputs = inputs
        self._outvars = traced.jaxpr.outvars
        self._input_index = {var: i for i, var in enumerate(traced.jaxpr.invars)}
        self._values: dict[Any, Any] = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
        self._origin = {
            var: (eqn, i) for eqn in traced.jaxpr.eqns for i, var in enumerate(eqn.outvars)
        }
        self._opened: dict[int, LazyOutputs] = {}

    def output(self, index: int) -> jax.Array:
        """The index-th output."""
        return self._value(self._outvars[index])

    def _value(self, var: Any) -> Any:
        if isinstance(var, jex_core.Literal):
            return var.val
        if var in self._input_index:
            held = self.inputs[self._input_index[var]]
            return held() if isinstance(held, _Thunk) else held
        if var not in self._values:
            eqn, index = self._origin[var]
            body = _called(eqn)
            if body is None:
                outs = _evaluate(eqn, [self._value(v) for v in eqn.invars])
                self._values.update(zip(eqn.outvars, outs, strict=True))
            else:
                if id(eqn) not in self._opened:
                    arguments = [_Thunk(self, v) for v in eqn.invars]
                    self._opened[id(eqn)] = LazyOutputs(body, arguments)
                self._values[var] = self._opened[id(eqn)].output(index)
        return self._values[var]


class _Thunk:
    """An argument of an opened call, computed when first needed."""

    def __init__(self, outer: LazyOutputs, var: Any):
        self._outer, self._var = outer, var

    def __call__(self) -> Any:
        return self._outer._value(self._var)


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _called(eqn: jex_core.JaxprEqn) -> jex_core.ClosedJaxpr | None:
    """The body of a call of a jitted function, None for any other equation."""
    return eqn.params["jaxpr"] if eqn.primitive.name in ("jit", "pjit") else None


def _evaluate(eqn: jex_core.JaxprEqn, values: list[Any]) -> list[Any]:
    """Carry out one equation."""
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return out if eqn.primitive.multiple_results else [out]
