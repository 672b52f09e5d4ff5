"""Which model? A folder, a hub name, or a shape by its common name, as its configuration.

A plan reads shapes alone, so nothing is fetched for a named shape, and of a hub model its
config.json only. The table holds the published config.json of each model, without the fields that
have no say in memory or that the family fills in.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from qlora_jax.checkpoints.folder import read_json
from qlora_jax.models import DecoderConfig, EncoderDecoderConfig, family_of


def _decoder(
    model_type: str,
    sizes: tuple[int, int, int, int, int, int],
    **more: Any,
) -> dict[str, Any]:
    hidden, inner, layers, heads, keys, vocab = sizes
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocab,
        **more,
    }


def _t5(sizes: tuple[int, int, int, int, int], **more: Any) -> dict[str, Any]:
    width, head, inner, layers, heads = sizes
    return {
        "model_type": "t5",
        "d_model": width,
        "d_kv": head,
        "d_ff": inner,
        "num_layers": layers,
        "num_heads": heads,
        "vocab_size": 32128,
        **more,
    }


_LLAMA_2 = {"max_position_embeddings": 4096}
_LLAMA_3 = {"max_position_embeddings": 131072, "rope_theta": 500000.0}
_LLAMA_32 = {**_LLAMA_3, "tie_word_embeddings": True}
_MISTRAL = {"max_position_embeddings": 32768, "rope_theta": 1e6}
_WIDE_MISTRAL = {**_MISTRAL, "head_dim": 128}
_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
_FLAN = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_QWEN_25 = {"max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6}
_QWEN_3 = {**_QWEN_25, "max_position_embeddings": 40960, "head_dim": 128}
_QWEN_3_EXPERTS = {
    **_QWEN_3,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
_TIED = {"tie_word_embeddings": True}
_GRANITE_33 = {
    "max_position_embeddings": 131072,
    "rope_theta": 1e7,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.0078125,
    "residual_multiplier": 0.22,
    "logits_scaling": 16.0,
}
_OLMO_2 = {"max_position_embeddings": 4096, "rope_theta": 500000.0, "rms_norm_eps": 1e-6}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": _decoder("llama", (4096, 11008, 32, 32, 32, 32000)),
    "llama-13b": _decoder("llama", (5120, 13824, 40, 40, 40, 32000)),
    "llama-33b": _decoder("llama", (6656, 17920, 60, 52, 52, 32000)),
    "llama-65b": _decoder("llama", (8192, 22016, 80, 64, 64, 32000)),
    "llama-2-7b": _decoder("llama", (4096, 11008, 32, 32, 32, 32000), **_LLAMA_2),
    "llama-2-13b": _decoder("llama", (5120, 13824, 40, 40, 40, 32000), **_LLAMA_2),
    "llama-2-70b": _decoder("llama", (8192, 28672, 80, 64, 8, 32000), **_LLAMA_2),
    "llama-3-8b": _decoder("llama", (4096, 14336, 32, 32, 8, 128256), **_LLAMA_3),
    "llama-3-70b": _decoder("llama", (8192, 28672, 80, 64, 8, 128256), **_LLAMA_3),
    "llama-3-405b": _decoder("llama", (16384, 53248, 126, 128, 8, 128256), **_LLAMA_3),
    "llama-3.2-1b": _decoder("llama", (2048, 8192, 16, 32, 8, 128256), **_LLAMA_32),
    "llama-3.2-3b": _decoder("llama", (3072, 8192, 28, 24, 8, 128256), **_LLAMA_32),
    "mistral-7b": _decoder("mistral", (4096, 14336, 32, 32, 8, 32768), **_MISTRAL),
    "mistral-nemo-12b": _decoder("mistral", (5120, 14336, 40, 32, 8, 131072), **_WIDE_MISTRAL),
    "mistral-small-24b": _decoder("mistral", (5120, 32768, 40, 32, 8, 131072), **_WIDE_MISTRAL),
    "mistral-large-123b": _decoder("mistral", (12288, 28672, 88, 96, 8, 32768), **_WIDE_MISTRAL),
    "mixtral-8x7b": _decoder("mixtral", (4096, 14336, 32, 32, 8, 32000), **_MISTRAL, **_EXPERTS),
    "qwen2.5-0.5b": _decoder("qwen2", (896, 4864, 24, 14, 2, 151936), **_QWEN_25, **_TIED),
    "qwen2.5-1.5b": _decoder("qwen2", (1536, 8960, 28, 12, 2, 151936), **_QWEN_25, **_TIED),
    "qwen2.5-3b": _decoder("qwen2", (2048, 11008, 36, 16, 2, 151936), **_QWEN_25, **_TIED),
    "qwen2.5-7b": _decoder("qwen2", (3584, 18944, 28, 28, 4, 152064), **_QWEN_25),
    "qwen2.5-14b": _decoder("qwen2", (5120, 13824, 48, 40, 8, 152064), **_QWEN_25),
    "qwen2.5-32b": _decoder("qwen2", (5120, 27648, 64, 40, 8, 152064), **_QWEN_25),
    "qwen2.5-72b": _decoder("qwen2", (8192, 29568, 80, 64, 8, 152064), **_QWEN_25),
    "qwen3-0.6b": _decoder("qwen3", (1024, 3072, 28, 16, 8, 151936), **_QWEN_3, **_TIED),
    "qwen3-1.7b": _decoder("qwen3", (2048, 6144, 28, 16, 8, 151936), **_QWEN_3, **_TIED),
    "qwen3-4b": _decoder("qwen3", (2560, 9728, 36, 32, 8, 151936), **_QWEN_3, **_TIED),
    "qwen3-8b": _decoder("qwen3", (4096, 12288, 36, 32, 8, 151936), **_QWEN_3),
    "qwen3-14b": _decoder("qwen3", (5120, 17408, 40, 40, 8, 151936), **_QWEN_3),
    "qwen3-32b": _decoder("qwen3", (5120, 25600, 64, 64, 8, 151936), **_QWEN_3),
    "qwen3-30b-a3b": _decoder(
        "qwen3_moe",
        (2048, 6144, 48, 32, 4, 151936),
        **_QWEN_3_EXPERTS,
        moe_intermediate_size=768,
    ),
    "qwen3-235b-a22b": _decoder(
        "qwen3_moe",
        (4096, 12288, 94, 64, 4, 151936),
        **_QWEN_3_EXPERTS,
        moe_intermediate_size=1536,
    ),
    "granite-3.3-8b": _decoder("granite", (4096, 12800, 40, 32, 8, 49159), **_GRANITE_33, **_TIED),
    "olmo-2-7b": _decoder("olmo2", (4096, 11008, 32, 32, 32, 100352), **_OLMO_2),
    "olmo-2-13b": _decoder("olmo2", (5120, 13824, 40, 40, 40, 100352), **_OLMO_2),
    "smollm3-3b": _decoder("smollm3", (2048, 11008, 36, 16, 4, 128256)),
    "t5-small": _t5((512, 64, 2048, 6, 8)),
    "t5-base": _t5((768, 64, 3072, 12, 12)),
    "t5-large": _t5((1024, 64, 4096, 24, 16)),
    "t5-3b": _t5((1024, 128, 16384, 24, 32)),
    "t5-11b": _t5((1024, 128, 65536, 24, 128)),
    "flan-t5-xl": _t5((2048, 64, 5120, 24, 32), **_FLAN),
    "flan-t5-xxl": _t5((4096, 64, 10240, 24, 64), **_FLAN),
}
"""Common name -> the fields of its config.json that decide its shape."""


Shape = DecoderConfig | EncoderDecoderConfig
"""What can be planned."""


def find_config(model: str | Path | Mapping[str, Any] | Shape) -> Shape:
    """The shape of a model.

    Args:
        model: a key of SHAPES ("llama-65b", any case), a folder with a config.json, a hub name
            `org/name` (its config.json is fetched), a config.json as a dict, or the shape itself.

    Raises:
        ValueError: none of these, an architecture that is not known, or a classifier.
        ConnectionError: a hub name whose config.json is neither cached nor to be had.
    """
    if isinstance(model, Shape):
        return model
    if isinstance(model, Mapping):
        config = family_of(model).read_config(model)
        if not isinstance(config, Shape):
            raise ValueError(
                f"model_type is {model.get('model_type')!r}, but plans are made of decoders and of "
                "encoder–decoders."
            )
        return config
    if str(model).lower() in SHAPES:
        return find_config(SHAPES[str(model).lower()])
    file = Path(model).expanduser() / "config.json"
    if not file.is_file() and str(model).count("/") == 1:
        file = _from_hub(str(model))
    if not file.is_file():
        raise ValueError(
            f"model is {str(model)!r}, but a folder with a config.json, a hub name org/name, or "
            f"one of these shapes is needed: {', '.join(SHAPES)}."
        )
    return find_config(read_json(file))


def _from_hub(name: str) -> Path:
    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConnectionError(
            f"The config.json of {name!r} is not in the cache and the hub did not give it "
            f"({type(error).__name__}): connect or log in, give a folder, or plan one of the named "
            f"shapes, such as llama-3-8b."
        ) from error
