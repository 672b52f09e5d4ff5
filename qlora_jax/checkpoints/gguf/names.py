"""Tensor names: Hugging Face's on one side, GGUF's on the other, by the `gguf` library's map."""

from collections.abc import Iterable
from types import ModuleType

from qlora_jax.checkpoints.gguf.architecture import Architecture


def library() -> ModuleType:
    """The `gguf` package.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'GGUF files need the gguf package: pip install "qlora-jax[gguf]".'
        ) from error
    return gguf


def gguf_names(names: Iterable[str], architecture: Architecture, layers: int) -> dict[str, str]:
    """Hugging Face's tensor names → GGUF's.

    Raises:
        ValueError: a tensor that the architecture has no name for.
    """
    gguf = library()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture.name], layers)
    found = {}
    for name in names:
        found[name] = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found[name] is None:
            raise ValueError(
                f"The tensor {name!r} has no name in GGUF's architecture {architecture.name!r}: "
                "export to safetensors."
            )
    return found


def heads_of(name: str, architecture: Architecture, config: dict) -> int | None:
    """In how many heads a GGUF tensor's rows are interleaved; None where they are not."""
    if not architecture.permuted:
        return None
    if ".attn_q." in name:
        return config["num_attention_heads"]
    if ".attn_k." in name:
        return config.get("num_key_value_heads") or config["num_attention_heads"]
    return None


def is_offset(name: str, architecture: Architecture) -> bool:
    """Whether a GGUF tensor is a norm's weight with an offset."""
    return architecture.norm_offset != 0 and name.endswith("norm.weight")
