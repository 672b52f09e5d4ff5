"""What crosses the bus in a step? Every copy between the card and pinned host memory, counted.

Four switches of training trade card memory for copies: paged optimizer state, gradient sums on the
host, layers' inputs that wait there for the backward pass, and weights that stream. Each is a
`jax.device_put` between memory spaces inside the jitted step, so the traced step tells them all:
JAX's types say which memory a value lies in, a copy is where that changes, and a copy inside the
loop over layers (or micro-batches) counts once for every turn. `fit` reports this sum for the step
it runs, and `qlora-jax plan` the same for a step that it only compiles.

What is left out: the batch's own token ids, kilobytes that every training step moves.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
from jax.extend import core

from qlora_jax.models.streaming import STREAMED_WEIGHTS
from qlora_jax.optim.paged import PAGED_STATE
from qlora_jax.train.accumulate import GRADIENT_SUMS

_HOST = jax.memory.Space.Host


class Crossing(NamedTuple):
    """Bytes that cross the bus in one step, in each direction."""

    to_device: int = 0
    to_host: int = 0

    def __bool__(self) -> bool:
        return bool(self.to_device or self.to_host)


class HostTraffic(NamedTuple):
    """Bytes between the card and pinned host memory in one step (one optimizer update)."""

    paged_state: Crossing = Crossing()
    """The optimizer's, master copies included: in and out once an update."""
    gradient_sums: Crossing = Crossing()
    """Where accumulation keeps them on the host: in and out once a micro-batch, and once
    more for the zeros before and the mean after."""
    activations: Crossing = Crossing()
    """What layers leave for the backward pass and `remat="offload"` keeps on the host."""
    streamed_weights: Crossing = Crossing()
    """In twice a micro-batch; nothing goes out."""

    @property
    def to_device(self) -> int:
        """Of all four."""
        return sum(part.to_device for part in self)

    @property
    def to_host(self) -> int:
        """Of all four."""
        return sum(part.to_host for part in self)

    @property
    def total(self) -> int:
        """Both directions together."""
        return self.to_device + self.to_host

    def __str__(self) -> str:
        if not self.total:
            return "none"
        parts = [
            f"{name.replace('_', ' ')} {_size(part.to_device)} in, {_size(part.to_host)} out"
            for name, part in zip(self._fields, self, strict=True)
            if part
        ]
        return f"{_size(self.total)} ({'; '.join(parts)})"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes by what crosses, and both sums."""
        parts = {name: part._asdict() for name, part in zip(self._fields, self, strict=True)}
        return parts | {"to_device": self.to_device, "to_host": self.to_host}


def host_traffic(step: Any, *args: Any) -> HostTraffic:
    """The copies of a jitted training step between device and pinned host memory.

    Args:
        step: of `make_train_step`.
        args: what it is called with, or shapes; what rests in pinned host memory says so by its
            sharding, whose mesh a shape has to name (`jax.sharding.NamedSharding`).
    """
    counted = dict.fromkeys(HostTraffic._fields, Crossing())
    for name, source, target, size in _copies(step.trace(*args).jaxpr.jaxpr, 1):
        if source == target:
            continue
        into, out = counted[name]
        if target == _HOST:
            counted[name] = Crossing(into, out + size)
        else:
            counted[name] = Crossing(into + size, out)
    return HostTraffic(**counted)


_NAMED = (PAGED_STATE, GRADIENT_SUMS, STREAMED_WEIGHTS)
"""Fields of `HostTraffic` whose copies are made under a `jax.named_scope` of the same name. Those
of activations are put in by checkpoint policies, which name nothing."""


def _copies(jaxpr: core.Jaxpr, turns: int) -> Iterator[tuple[str, Any, Any, int]]:
    """(what, from, to, bytes) of every copy, each multiplied by the turns of the loops around."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "device_put":
            scope = str(equation.source_info.name_stack)
            what = next((name for name in _NAMED if name in scope), "activations")
            for before, after in zip(equation.invars, equation.outvars, strict=True):
                source, target = cast(Any, before.aval), cast(Any, after.aval)
                size = source.size * source.dtype.itemsize
                yield what, source.memory_space, target.memory_space, turns * size
        inner = turns
        if equation.primitive.name == "scan":
            inner *= equation.params["length"]
        for sub in core.jaxprs_in_params(equation.params):
            yield from _copies(sub, inner)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 100 else f"{count / 2**20:.2f} MiB"
