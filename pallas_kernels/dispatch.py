"""Which implementation runs: one table of data, asked once per call.

`implementation=None` lets the table (`tuned.json`, beside this file) choose by card and rows of x;
a name is taken at its word and refused in one sentence where it cannot run. Nothing falls back
silently: `which_implementation` answers beforehand what a call would run, and why.

The machine is the card of the mesh in scope (so a program compiled for a card that is not here,
under `jax.sharding.use_abstract_mesh`, is planned for that card), else JAX's default device.

The first rule of `tuned.json` that fits *and can run on this weight* wins; XLA stands behind the
last (`_table` says how to read them). The rules of the H200 are measured; those of the H100 (the
same multiprocessors, slower memory) are taken over from it, and those of "*" are the H200's Triton
rules. `benchmarks/gpu_kernels.py` measures the candidates of `configs_to_try` and writes the rules
of a card.

Three things the table knows. The Hopper matmuls cut the result into tiles of 256 rows by 128
columns and pay for decoding by the tile, so they want 64 tiles or more: hence `min_out`, which
falls as `min_rows` rises. The Triton tile kernels reach a fifth of the tensor cores' rate, so for
many rows Triton's rule is `fused=False`: dequantize, multiply in XLA, one 16-bit weight at a time.
The Hopper gemv is taken as far as a card has measured it, to 8 rows and `max_x`; beyond, by name.
"""

import dataclasses
import difflib
import functools
import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels._arguments import Layout, check_flag, check_float, whole
from pallas_kernels._mosaic import why_not_mosaic
from pallas_kernels._table import TABLE, Config, Rule, config_type, cuts, rules
from pallas_kernels._triton_config import TritonConfig, why_not_triton
from pallas_kernels.cards import CARDS
from pallas_kernels.nf4_matmul import mosaic_plan as matmul_plan

MAX_ROWS = 16
"""Rows of x up to which `nf4_gemv` is the better kernel, and beyond which `nf4_matmul` is."""

IMPLEMENTATIONS = ("xla", "triton", "mosaic_gpu", "jax_triton")

AVAILABLE = {
    "nf4_dequantize": ("xla", "triton", "jax_triton"),
    "nf4_matmul": ("xla", "triton", "mosaic_gpu"),
    "nf4_matmul_transposed": ("xla", "triton", "mosaic_gpu"),
    "nf4_gemv": ("xla", "triton", "mosaic_gpu"),
}
"""op -> the implementations it has."""

# `wgmma` is Hopper's alone; the gemv uses no instruction that a B200 lacks.
_MOSAIC_CAPABILITIES = {
    "nf4_matmul": ((9, 0),),
    "nf4_matmul_transposed": ((9, 0),),
    "nf4_gemv": ((9, 0), (10, 0)),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a call runs: the implementation, its tile sizes if it has any, and the reason.

    `fuse_lora` says whether an adapter is added inside the kernel or by a product after it.
    """

    implementation: str
    config: Config | None
    reason: str
    fuse_lora: bool = False


def _choice(
    rule: Rule, card: str | None, rows: int, layout: Layout, dtype: DTypeLike, reason: str
) -> Choice:
    """What a rule says of this weight: the config is the rule's, unless its shape was measured."""
    measured = (cut.config for cut in cuts() if cut.covers(rule, card, rows, layout.shape))
    able = (config for config in measured if matmul_plan.takes_rows(config, rows))
    config = next(able, _narrowed(rule.config, dtype))
    return Choice(rule.implementation, config, reason, rule.fuse_lora)


def _narrowed(config: Config | None, dtype: DTypeLike) -> Config | None:
    """Half of a tile's rows of W for float32, which takes twice the registers and would spill."""
    if not isinstance(config, TritonConfig) or jnp.dtype(dtype) != jnp.float32:
        return config
    is_tile = config.fused and config.block_m > 1
    return dataclasses.replace(config, block_n=config.block_n // 2) if is_tile else config


def config_for(op: str, choice: Choice, config: Config | None) -> Any:
    """The caller's config for a kernel where there is one, else the choice's."""
    if config is None:
        return choice.config
    if choice.implementation == "xla":
        raise ValueError(
            f"config is a {type(config).__name__}, and {op} runs 'xla' here, which takes none "
            f"({choice.reason}): pass config=None, or another implementation"
        )
    wanted = config_type(op, choice.implementation)
    if not isinstance(config, wanted):
        raise ValueError(
            f"config is a {type(config).__name__}, and {op} runs {choice.implementation!r} here, "
            f"which takes a {wanted.__name__}: pass one, or config=None, or another implementation"
        )
    return config


def target() -> str:
    """The kind of device that programs traced now are for: "cpu", "TPU v5e" or a card's name."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh is None or mesh.empty else getattr(mesh, "abstract_device", None)
    if device is None:
        # A device, the name of a platform, or None.
        device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return str(device.device_kind)


def card_name(kind: str) -> str | None:
    """The key in CARDS of a device kind; "other" for a card not in it; None if not NVIDIA's."""
    for card in CARDS.values():
        if kind in (card.name, card.description, card.pallas_kind):
            return card.name
    return "other" if kind.startswith(("NVIDIA", "Tesla", "Quadro")) else None


_OTHER_KINDS = ("cpu", "TPU ", "AMD ", "Radeon", "gfx", "Intel")
"""How kinds of devices begin that are not NVIDIA's."""


def _check_kind(kind: Any) -> None:
    """Refuse what is no kind of device, such as a card's name misspelt."""
    if isinstance(kind, str) and (card_name(kind) or kind.startswith(_OTHER_KINDS)):
        return
    if kind in [device.device_kind for device in jax.devices()]:
        return
    names = {
        name.lower(): name for card in CARDS.values() for name in (card.name, card.description)
    }
    near = difflib.get_close_matches(str(kind).lower(), names, n=1)
    meant = f"did you mean {names[near[0]]!r}?" if near else f"the cards are {list(CARDS)}"
    raise ValueError(
        f"kind is {kind!r}; expected a card's name, or a device kind as JAX reports it, such as "
        f"'cpu' or 'NVIDIA H200': {meant}"
    )


def capability(kind: str) -> tuple[int, int] | None:
    """The compute capability of a kind of card, as CARDS or the card itself tells it, else None."""
    name = card_name(kind)
    if name in CARDS:
        return CARDS[name].compute_capability
    here = (device for device in jax.devices() if name and device.device_kind == kind)
    version = getattr(next(here, None), "compute_capability", None)
    if version is None:
        return None
    major, minor = str(version).split(".")
    return int(major), int(minor)


def which_implementation(
    op: str,
    rows: int,
    layout: Layout,
    *,
    implementation: str | None = None,
    interpret: bool = False,
    kind: str | None = None,
    dtype: DTypeLike = jnp.bfloat16,
) -> Choice:
    """What a call of `op` runs for `rows` rows of activations against a weight of this layout.

    Args:
        op: a key of AVAILABLE; of 1 to 16 rows, "nf4_matmul" is "nf4_gemv", as the call is.
        rows: rows of x (1 for nf4_dequantize).
        layout: the weight, see `pallas_kernels.Layout`.
        implementation: what the caller asks for; None asks the table.
        interpret: run kernels in Pallas' interpreter, on any machine (for tests).
        kind: the device to choose for, as `target` names it; by default `target()`.
        dtype: of the activations, or of the dequantized weight.

    Raises:
        ValueError: an op, an implementation or a kind that is unknown, or an implementation that
            cannot run there, or not on this weight.
        TypeError: `layout` is no `Layout`, or `interpret` no truth value.
    """
    if whole(rows) is None or rows < 0:
        raise ValueError(f"rows is {rows!r}; expected a whole number, 0 or more")
    if not isinstance(layout, Layout):
        raise TypeError(
            f"layout is of type {type(layout).__name__}; expected a pallas_kernels.Layout, such as "
            "the layout of a QuantizedTensor"
        )
    check_float("dtype", dtype)
    if kind is not None:
        _check_kind(kind)
    if op == "nf4_gemv" and rows > MAX_ROWS:
        raise ValueError(f"rows is {rows}, but nf4_gemv takes up to {MAX_ROWS}: ask of nf4_matmul")
    if op == "nf4_matmul" and 1 <= rows <= MAX_ROWS:
        op = "nf4_gemv"
    return choose(
        op, rows, layout, implementation=implementation, interpret=interpret, kind=kind, dtype=dtype
    )


def choose(
    op: str,
    rows: int,
    layout: Layout,
    *,
    implementation: str | None,
    interpret: bool = False,
    kind: str | None = None,
    dtype: DTypeLike,
) -> Choice:
    """`which_implementation` for this very op and arguments that are checked."""
    check_flag("interpret", interpret)
    if op not in AVAILABLE:
        raise ValueError(f"op is {op!r}; expected one of {list(AVAILABLE)}")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}; expected None or one of {list(IMPLEMENTATIONS)}"
        )
    kind = target() if kind is None else kind
    if implementation is not None:
        problem = why_not(
            op, implementation, rows, layout, kind=kind, interpret=interpret, dtype=dtype
        )
        if problem:
            raise ValueError(
                f"implementation is {implementation!r}, but {problem}: "
                "pass implementation='xla', or None to let pallas_kernels choose"
            )
    name = card_name(kind)
    if implementation == "xla":
        return Choice("xla", None, "asked for")
    if rows == 0:
        return Choice("xla", None, "there are no rows, and so no blocks of threads for a kernel")
    if implementation is None and name is None:
        return Choice("xla", None, f"the program is for {kind!r}, which is not an NVIDIA card")
    outputs, inputs = layout.shape[0], layout.shape[-1]
    if op == "nf4_matmul_transposed":
        outputs, inputs = inputs, outputs
    found = [rule for rule in rules() if rule.covers(op, name, rows, inputs, outputs)]
    if implementation is not None:
        tiled = "triton" if implementation == "jax_triton" else implementation
        for rule in found:
            if rule.implementation == tiled:
                choice = _choice(rule, name, rows, layout, dtype, "asked for")
                return dataclasses.replace(choice, implementation=implementation)
        return Choice(implementation, None, "asked for")
    refused = ""
    for rule in found:
        problem = why_not(
            op, rule.implementation, rows, layout, kind=kind, interpret=interpret, dtype=dtype
        )
        if problem is None:
            whose = "every card" if rule.card == "*" else rule.card
            return _choice(rule, name, rows, layout, dtype, f"rule for {whose}{refused}")
        refused += f"; not {rule.implementation}: {problem}"
    return Choice("xla", None, f"no rule of {TABLE.name} can run {op} here{refused}")


def why_not(
    op: str,
    implementation: str,
    rows: int,
    layout: Layout,
    *,
    kind: str,
    interpret: bool,
    dtype: DTypeLike,
) -> str | None:
    """Why an implementation cannot run `op` there on this weight; None where it can."""
    if implementation == "xla":
        return None
    if implementation not in AVAILABLE[op]:
        return f"{op} has only {list(AVAILABLE[op])}"
    name = card_name(kind)
    if name is None and not interpret:
        return f"it needs an NVIDIA card and the program is for {kind!r}"
    found = capability(kind)
    if implementation == "mosaic_gpu":
        if interpret:
            return "Pallas' interpreter cannot run it (its own emulation is in the tests)"
        if found not in _MOSAIC_CAPABILITIES[op]:
            needed = " or ".join(f"{major}.{minor}" for major, minor in _MOSAIC_CAPABILITIES[op])
            return f"it needs compute capability {needed} and {kind!r} has another"
        return why_not_mosaic(op, rows, layout, dtype)
    if implementation == "jax_triton":
        if interpret:
            return "Pallas' interpreter cannot run it (Triton's own does, in the tests)"
        problem = missing_jax_triton()
        if problem:
            return problem
    if found is not None and found < (8, 0) and not interpret:
        return f"it needs compute capability 8.0 and {kind!r} is older"
    return why_not_triton(layout, by_rows=op != "nf4_dequantize")


@functools.cache
def missing_jax_triton() -> str | None:
    """What the extra [triton] still needs here, or None where it is complete."""
    found = {}
    for package, least in (("jax-triton", (0, 4)), ("triton", (3, 7))):
        wanted = f"{package} >= {least[0]}.{least[1]}"
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed (pip install 'qlora-jax[triton]')"
        found[package] = tuple(int(part) for part in version.split(".")[:2])
        if found[package] < least:
            return f"{package} is {version} and it needs {wanted}"
    # Its rule for dead code has jax 0.11's signature: one kernel lowers, one in a scan does not.
    if jax.__version_info__ >= (0, 12) and found["jax-triton"] < (0, 5):
        return f"jax-triton 0.4 cannot be lowered in loops by jax {jax.__version__}, only by 0.11"
    return None
