"""Reading and writing config.json: what most decoder families have in common.

transformers 4 and 5 write the same file in two styles; both are read, and what is written is read
by both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.family import number, read_rope, required, write_rope

# transformers' names; its other two tanh approximations of GELU are the same sum.
_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def read_activation(config: Mapping[str, Any], key: str, *known: str) -> Any:
    """The activation of the MLP, one of `known` (transformers' names); the first is the default.

    Raises:
        ValueError: it is another one.
    """
    given = config.get(key) or known[0]
    if given not in known:
        raise ValueError(
            f"config.json has {key} {given!r}, but a {config.get('model_type', 'model')!r} uses "
            f"{' or '.join(map(repr, known))}: check that the file belongs to the checkpoint."
        )
    return _ACTIVATIONS[given]


def write_activation(name: str) -> str:
    """transformers' name of an activation."""
    return next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == name)


def refuse(config: Mapping[str, Any], **plain: Any) -> None:
    """Refuses a config.json that asks for what is not built here: fields must be absent or plain.

    Raises:
        ValueError: one of them is something else.
    """
    for key, value in plain.items():
        if config.get(key) not in (None, value):
            raise ValueError(
                f"config.json has {key} {config[key]!r}, but only {value!r} is supported of a "
                f"{config.get('model_type')!r}: choose another checkpoint."
            )


def read_decoder(
    config: Mapping[str, Any],
    *,
    context: int = 2048,
    eps: float = 1e-6,
    tied: bool = False,
    theta: float = 10000.0,
    **fields: Any,
) -> DecoderConfig:
    """A decoder whose config.json names its fields as Llama's does.

    Args:
        config: the file.
        context, eps, tied, theta: the family's values where the file names none.
        **fields: of `DecoderConfig`: what else the family has, and what to read otherwise.

    Raises:
        ValueError: a field is missing, or contradicts another.
    """
    refuse(config, is_causal=True)
    heads = required(config, "num_attention_heads")
    hidden = required(config, "hidden_size")
    longest = config.get("max_position_embeddings") or context
    if "rope" not in fields:
        # A scaling that does not say what it stretches stretches that.
        fields["rope"] = read_rope({**config, "max_position_embeddings": longest}, theta=theta)
    return DecoderConfig(
        **{
            "vocab_size": required(config, "vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": required(config, "intermediate_size"),
            "num_hidden_layers": required(config, "num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or hidden // heads,
            "max_position_embeddings": longest,
            "norm_eps": number(config, "rms_norm_eps", eps),
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", tied)),
            "model_type": config["model_type"],
            **fields,
        }
    )


def write_decoder(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    """What `read_decoder` reads back, in transformers 4's style, which transformers 5 reads too."""
    return {
        "architectures": [architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": write_activation(config.hidden_act),
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        **write_rope(config.rope),
    }


def read_layer_types(
    config: Mapping[str, Any], window: int | None, usual: Sequence[str]
) -> dict[str, Any]:
    """`sliding_window` and `layer_types` of a `DecoderConfig`.

    Args:
        config: the file; its `layer_types`, newer than the models, has the word.
        window: the sliding layers' window, or None if there are none.
        usual: the layers' types where the file does not tell.

    Raises:
        ValueError: a layer has a type that is not built here.
    """
    types = tuple(config.get("layer_types") or usual)
    strange = set(types) - {"sliding_attention", "full_attention"}
    if strange:
        raise ValueError(
            f"config.json has layer_types {sorted(strange)}, but only 'sliding_attention' and "
            "'full_attention' are supported: choose another checkpoint."
        )
    if window is None or "sliding_attention" not in types:
        return {"sliding_window": None, "layer_types": None}
    return {
        "sliding_window": window,
        "layer_types": types if "full_attention" in types else None,
    }
