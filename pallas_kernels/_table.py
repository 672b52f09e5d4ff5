"""The dispatch's tables: which implementation runs where, and how a card cuts a shape it measured.

A rule of `tuned.json` reads: for this op, on this card ("*": any), from `min_rows` to `max_rows`
rows, from `min_out` columns of the result on and up to `max_x` elements of x (rows · columns), run
this implementation with this config (null leaves it to the kernel), and add an adapter inside the
kernel if `fuse_lora`.

A cut of `cuts.json` reads: where a rule has chosen this implementation, a weight of exactly this
shape takes this config instead of the rule's. It holds what a card has measured to be faster than
what the kernel takes by itself.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pallas_kernels._triton_config import TritonConfig
from pallas_kernels.nf4_gemv.mosaic_plan import GemvConfig
from pallas_kernels.nf4_matmul.mosaic_plan import MatmulConfig

TABLE = Path(__file__).with_name("tuned.json")
CUTS = Path(__file__).with_name("cuts.json")

Config = TritonConfig | GemvConfig | MatmulConfig
"""How a kernel cuts its work."""


def config_type(op: str, implementation: str) -> type[Config]:
    """What configures the implementation's kernel of `op`."""
    if implementation != "mosaic_gpu":
        return TritonConfig
    return GemvConfig if op == "nf4_gemv" else MatmulConfig


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of `tuned.json`. The limits are inclusive; `card` is a key of CARDS or "*"."""

    op: str
    card: str
    max_rows: int
    implementation: str
    config: Config | None
    min_rows: int = 0
    min_out: int = 0
    max_x: int = sys.maxsize
    fuse_lora: bool = False

    def covers(self, op: str, card: str | None, rows: int, inputs: int, outputs: int) -> bool:
        """Whether the rule speaks of this op and card, and of `rows` rows of so many columns of x
        and of the result."""
        here = self.op == op and self.card in (card, "*")
        sizes = outputs >= self.min_out and rows * inputs <= self.max_x
        return here and self.min_rows <= rows <= self.max_rows and sizes


@dataclasses.dataclass(frozen=True)
class Cut:
    """One line of `cuts.json`, for weights of one shape. The limits are inclusive."""

    op: str
    card: str
    min_rows: int
    max_rows: int
    implementation: str
    shape: tuple[int, ...]
    config: Config

    def covers(self, rule: Rule, card: str | None, rows: int, shape: tuple[int, ...]) -> bool:
        """Whether the cut is for this weight under this rule."""
        here = (self.op, self.implementation) == (rule.op, rule.implementation)
        same = self.card == card and self.shape == shape
        return here and same and self.min_rows <= rows <= self.max_rows


_before = contextvars.ContextVar[Path | None]("before", default=None)


@contextlib.contextmanager
def using_table(path: Path) -> Iterator[None]:
    """Let the rules of another file go before the table's for what is traced inside, such as a
    card's own that `benchmarks.gpu_kernels` has just written."""
    token = _before.set(path)
    try:
        yield
    finally:
        _before.reset(token)


def rules() -> tuple[Rule, ...]:
    """The rules that hold, the first to ask first."""
    before = _before.get()
    return _read_rules(TABLE) if before is None else _read_rules(before) + _read_rules(TABLE)


@functools.cache
def _read_rules(path: Path) -> tuple[Rule, ...]:
    """A file's rules, read once."""
    return tuple(Rule(**_with_config(entry)) for entry in json.loads(path.read_text("utf-8")))


@functools.cache
def cuts() -> tuple[Cut, ...]:
    """The cuts, read once."""
    entries = map(_with_config, json.loads(CUTS.read_text("utf-8")))
    return tuple(Cut(**entry | {"shape": tuple(entry["shape"])}) for entry in entries)


def _with_config(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with its config, if it has one, as the dataclass that it is written from."""
    kind = config_type(entry["op"], entry["implementation"])
    return entry | {"config": kind(**entry["config"]) if entry["config"] else None}
