"""Which linear layers of a 4-bit folder are dense, and how config.json says so.

transformers does not look at a folder's tensors to tell. Before it reads them, it replaces every
linear layer of the model by a 4-bit one, except for

- the output embedding, if `llm_int8_skip_modules` is null;
- what that list names, if there is one: then the list alone counts;
- what the model class keeps wide (`_keep_in_fp32_modules`), whatever the list: T5's `wo`.

A layer that the folder holds otherwise is not read. So a folder needs the list that fits it, and a
T5's `wo` in 16 or 32 bits.
"""

import itertools
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from qlora_jax.checkpoints.checkpoint import Checkpoint, dequantized
from qlora_jax.checkpoints.matching import linear_weights
from qlora_jax.models import family_of
from qlora_jax.nn.targets import ALSO_CALLED


def packable_weights(checkpoint: Checkpoint) -> frozenset[str]:
    """The tensors of a dense checkpoint that a folder in 4 bits holds as codes: the layers' linear
    weights, but for what transformers never reads so.

    Raises:
        ValueError: an unknown architecture.
    """
    return linear_weights(checkpoint) - _kept_dense(checkpoint)


def with_kept_dense(checkpoint: Checkpoint) -> Checkpoint:
    """The same with dense numbers, those that the codes stand for, where transformers reads no
    codes."""
    return dequantized(checkpoint, names=_kept_dense(checkpoint))


def skip_modules(checkpoint: Checkpoint) -> list[str] | None:
    """`llm_int8_skip_modules` for a folder of a checkpoint in 4 bits.

    None where transformers, left alone, expects as dense what is dense. Else as few names as mean
    all of it, in any version of transformers, and nothing that is in codes.

    Raises:
        ValueError: an unknown architecture.
    """
    family = family_of(checkpoint.config)
    config = family.for_weights(family.read_config(checkpoint.config), checkpoint.tensors)
    slots = family.weight_names(config)
    # Whether the checkpoint has it or not: the model that reads the folder does.
    modules = dict.fromkeys([family.output] if family.output else [])
    for name in (*slots, *checkpoint.tensors):
        module, _, kind = name.rpartition(".")
        own = name in slots and slots[name].path[-1] == "kernel"
        if own or (kind == "weight" and _matches(module, family.linears)):
            modules[module] = None
    packed = {name.rpartition(".")[0] for name, info in checkpoint.tensors.items() if info.quant}
    dense = [module for module in modules if module not in packed]
    unasked = {m for m in modules if m == family.output or _matches(m, family.kept_dense)}
    if set(dense) == unasked:
        return None
    names = [(_short(module, packed), *ALSO_CALLED.get(module, ())) for module in dense]
    return list(dict.fromkeys(itertools.chain.from_iterable(names)))


def _kept_dense(checkpoint: Checkpoint) -> frozenset[str]:
    patterns = family_of(checkpoint.config).kept_dense
    return frozenset(n for n in checkpoint.tensors if _matches(n.removesuffix(".weight"), patterns))


def _matches(module: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def _short(module: str, packed: set[str]) -> str:
    """The shortest way to name a dense module that means none of the packed ones: what its name
    begins with ("classifier"), what it ends in ("wo"), or all of it."""
    parts = module.split(".")
    return next(
        (name for name in (parts[0], parts[-1]) if not any(_means(name, p) for p in packed)), module
    )


def _means(name: str, module: str) -> bool:
    """Whether transformers 4 or 5 takes an entry of the list to mean a module."""
    four = name in (module, module.rpartition(".")[2]) or f"{name}." in module
    five = module.endswith(name) or re.match(rf"{re.escape(name)}(?:\.|$)", module) is not None
    return four or five
