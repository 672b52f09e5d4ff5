"""The architectures that can be loaded, by the `model_type` of their config.json."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.families.bloom import BLOOM
from qlora_jax.models.families.field_kinds import check_config
from qlora_jax.models.families.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_TEXT
from qlora_jax.models.families.gpt_neox import GPT_NEOX
from qlora_jax.models.families.granite import GRANITE
from qlora_jax.models.families.llama import LLAMA
from qlora_jax.models.families.mistral import MINISTRAL, MISTRAL
from qlora_jax.models.families.mixtral import MIXTRAL
from qlora_jax.models.families.olmo import OLMO2, OLMO3, OLMOE
from qlora_jax.models.families.opt import OPT
from qlora_jax.models.families.phi3 import PHI3
from qlora_jax.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from qlora_jax.models.families.roberta import ROBERTA
from qlora_jax.models.families.smollm3 import SMOLLM3
from qlora_jax.models.families.stablelm import STABLELM
from qlora_jax.models.families.starcoder2 import STARCODER2
from qlora_jax.models.families.t5 import T5
from qlora_jax.models.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        MINISTRAL,
        MIXTRAL,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        GEMMA,
        GEMMA2,
        GEMMA3,
        GEMMA3_TEXT,
        PHI3,
        GRANITE,
        SMOLLM3,
        OLMO2,
        OLMO3,
        OLMOE,
        STARCODER2,
        STABLELM,
        GPT_NEOX,
        OPT,
        BLOOM,
        T5,
        ROBERTA,
    )
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config.json (as a dict) belongs to, which can read it then.

    Raises:
        ValueError: none of ours, or a field of a kind that it cannot be of.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        named = "names no model_type" if model_type is None else f"has model_type {model_type!r}"
        raise ValueError(
            f"config.json {named}, but only these architectures are known: "
            f"{', '.join(sorted(FAMILIES))}; choose a checkpoint of one of them."
        )
    check_config(config)
    return FAMILIES[model_type]
