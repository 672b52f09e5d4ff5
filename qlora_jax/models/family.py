"""What one architecture has to tell: how its config.json reads, and what its weights are called.

A family is one small file (`families/llama.py`) that fills in a `Family`; `families/__init__.py`
lists them. Nothing else in the library knows the names of another library's fields.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qlora_jax.models.rope import ROPE_TYPES, RopeConfig, attention_factor


class Slot(NamedTuple):
    """Where a checkpoint's tensor lives in the module tree.

    Attributes:
        path: attribute names from the model down to a Variable, such as
            `("layers", "mlp", "up_proj", "kernel")`.
        layer: index along the leading axis of stacked layers, or along several leading axes
            (layer, expert), or None outside of them.
    """

    path: tuple[str, ...]
    layer: int | tuple[int, ...] | None

    @property
    def stack_index(self) -> tuple[int, ...]:
        """The index as a tuple: () outside of stacks."""
        if self.layer is None:
            return ()
        return self.layer if isinstance(self.layer, tuple) else (self.layer,)


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face's transformers.

    Attributes:
        model_type: its name in a config.json.
        read_config: config.json (as a dict) → the configuration that `build` takes, which has at
            least `model_type` (this one's) and `head_dim`.
        write_config: the way back; what transformers 4 and 5 both read.
        weight_names: the tensors of a checkpoint, by their names there.
        build: the model class; its constructor's arguments are `Decoder`'s.
        ignored: patterns (`fnmatch`) of tensors that checkpoints of the family may carry besides,
            because the model computes them itself or holds them under another name.
        fresh: patterns of tensors that a checkpoint may lack, because they are new for every task:
            they start random.
        for_weights: (configuration, tensor names of a checkpoint) → the configuration of that
            checkpoint, where config.json alone does not tell it.
        root: what leads the names of the base's tensors in a model with a head, and not in one
            without (transformers' `base_model_prefix`); "" where they are called alike.
        output: what transformers calls the linear layer that gives logits over the vocabulary; it
            quantizes that one only when told to. None where there is none.
        linears: patterns of further modules that are linear layers there and no `QuantDense` here.
        kept_dense: patterns of linear layers that transformers never reads in 4 bits.
    """

    model_type: str
    read_config: Callable[[Mapping[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    weight_names: Callable[[Any], dict[str, Slot]]
    build: type[Any]
    ignored: tuple[str, ...] = (
        "*.rotary_emb.inv_freq",
        "*.rotary_pos_emb.inv_freq",
        "lm_head.weight",
    )
    fresh: tuple[str, ...] = ()
    for_weights: Callable[[Any, Collection[str]], Any] = lambda config, names: config
    root: str = "model"
    output: str | None = "lm_head"
    linears: tuple[str, ...] = ()
    kept_dense: tuple[str, ...] = ()


def module_names(tensors: Mapping[str, Slot]) -> dict[str, list[str]]:
    """What the modules of a tree are called in checkpoints, from what their tensors are called.

    Args:
        tensors: as `Family.weight_names` gives them.

    Returns:
        Dotted tree path → the module's name, or the names of each layer of a stack in order.
    """
    found: dict[str, dict[tuple[int, ...], str]] = {}
    for name, slot in tensors.items():
        path = ".".join(slot.path[:-1])
        found.setdefault(path, {})[slot.stack_index] = name.rpartition(".")[0]
    return {path: [names[i] for i in sorted(names)] for path, names in found.items()}


def required(config: Mapping[str, Any], key: str) -> Any:
    """A field that every config.json of the family has.

    Raises:
        ValueError: it is missing.
    """
    if config.get(key) is None:
        raise ValueError(
            f"config.json has no {key!r}, which a {config.get('model_type', 'model')!r} needs: "
            "take the whole config.json of the checkpoint."
        )
    return config[key]


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A field that is a number; the default where the file says nothing."""
    value = config.get(key)
    return default if value is None else float(value)


def read_rope(
    config: Mapping[str, Any], *, theta: float = 10000.0, partial: float | None = None
) -> RopeConfig:
    """Rotary frequencies from a config.json in either style.

    transformers 4 writes `rope_theta` and `rope_scaling` (with `rope_type`, once `type`);
    transformers 5 writes one `rope_parameters`.

    Args:
        config: the file.
        theta: the family's base where the file names none.
        partial: the share of a head that is turned where the file names none; None for a family
            that turns all of it, whatever the file says.

    Raises:
        ValueError: a scaled rope without its numbers, two ropes, or a share where there is none.
    """
    if config.get("rope_parameters") and config.get("rope_scaling"):
        return _of_both(config, theta, partial)
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = given.get("rope_type") or given.get("type") or "default"
    fields: dict[str, Any] = {
        key: number(given, key, 0.0) or number(config, key, 0.0) or default
        for key, default in (("rope_theta", theta), ("partial_rotary_factor", partial or 1.0))
    }
    if partial is None and fields["partial_rotary_factor"] != 1.0:
        raise ValueError(
            f"config.json has partial_rotary_factor {fields['partial_rotary_factor']:g}, but a "
            f"{config.get('model_type', 'model')!r} of transformers turns whole heads: take the "
            "field out if the weights were trained so, or choose another checkpoint."
        )
    if kind == "default":
        return RopeConfig(**fields)
    longest = config.get("max_position_embeddings") or 2048
    # The growing base is measured from the config's own length; the others may name another, and
    # what stands outside of the rope's own fields has the word.
    before = "original_max_position_embeddings"
    original = None if kind == "dynamic" else config.get(before) or given.get(before)
    if kind in ("longrope", "su"):
        kind = "longrope"
        for name in ("short_factor", "long_factor"):
            fields[name] = tuple(map(float, required(given, name)))
    # transformers takes the quotient of the lengths for a null, of yarn alone.
    quotient_serves = kind == "longrope" or (kind == "yarn" and "factor" in given)
    if kind in ROPE_TYPES and given.get("factor") is None and not quotient_serves:
        raise ValueError(
            f"config.json scales its rope by {kind!r} without a factor: take the whole "
            "config.json of the checkpoint."
        )
    original = int(original or longest)
    quotient = longest / original
    fields |= {
        "rope_type": kind,
        "original_max_position_embeddings": original,
        "factor": quotient,
    }
    for name in (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    ):
        if given.get(name) is not None:
            fields[name] = number(given, name, 0.0)
    if "truncate" in given:
        fields["truncate"] = bool(given["truncate"])
    rope = RopeConfig(**fields)
    if kind == "longrope" and rope.factor != quotient:
        # The one thing it is for; a written file has no place for the factor itself.
        rope = replace(rope, factor=quotient, attention_factor=attention_factor(rope))
    return rope


def _of_both(config: Mapping[str, Any], theta: float, partial: float | None) -> RopeConfig:
    """What `rope_parameters` and `rope_scaling` both say, where a file has the two.

    Raises:
        ValueError: they say different things. transformers takes `rope_scaling` then, and forgets
            the base that stands in `rope_parameters`.
    """
    one, other = (
        read_rope({**config, left_out: None}, theta=theta, partial=partial)
        for left_out in ("rope_parameters", "rope_scaling")
    )
    if one != other:
        raise ValueError(
            "config.json has both rope_scaling, of transformers 4, and rope_parameters, of "
            "transformers 5, and they differ: put what is meant into rope_parameters, rope_theta "
            "with it, and take rope_scaling out."
        )
    return one


def write_rope(rope: RopeConfig | None) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` in transformers 4's style, which transformers 5 reads too."""
    if rope is None:
        return {}
    base: dict[str, Any] = {"rope_theta": rope.rope_theta, "rope_scaling": None}
    if rope.partial_rotary_factor != 1.0:
        base["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.rope_type == "default":
        return base
    scaling: dict[str, Any] = {"rope_type": rope.rope_type}
    optional: tuple[str, ...] = ()
    if rope.rope_type == "longrope":
        # Three fields and no more, or transformers 4 refuses them; the factor follows from lengths.
        scaling = {
            "type": "longrope",
            "short_factor": list(rope.short_factor or ()),
            "long_factor": list(rope.long_factor or ()),
        }
        base["original_max_position_embeddings"] = rope.original_max_position_embeddings
        optional = ("attention_factor",)
    else:
        scaling["factor"] = rope.factor
    if rope.rope_type in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.rope_type == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
    if rope.rope_type == "yarn":
        scaling |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "truncate": rope.truncate,
        }
        optional = ("attention_factor", "mscale", "mscale_all_dim")
    scaling |= {name: getattr(rope, name) for name in optional if getattr(rope, name) is not None}
    return base | {"rope_scaling": scaling}
