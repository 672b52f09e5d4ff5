"""Tiny random models of transformers' own classes, for what `vectors/models` lacks."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="make test-peers installs it")
transformers = pytest.importorskip("transformers", reason="make test-peers installs it")

IDS = np.asarray([[0, 5, 9, 30, 7, 22, 2], [0, 11, 2, 33, 8, 4, 2]], np.int32)
# Fields that decoders share.
TINY = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# A Gemma 3 that also sees: the eye's layers have some of the text's last names.
SEEING = {
    "mm_tokens_per_image": 4,
    "image_token_index": 47,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "text_config": TINY | {"model_type": "gemma3_text", "head_dim": 8},
}


# Multiples of the blocksize: bitsandbytes' CPU library misreads others (shared facts).
def t5(**options):
    config = transformers.T5Config(
        vocab_size=40,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        **options,
    )
    return transformers.T5ForConditionalGeneration(config)


def flan():
    peer = t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    peer.lm_head.weight = torch.nn.Parameter(torch.randn(40, 64))
    return peer


def roberta():
    config = transformers.RobertaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=20,
        type_vocab_size=1,
        initializer_range=0.3,
        num_labels=3,
    )
    return transformers.RobertaForSequenceClassification(config)


def mixtral():
    config = transformers.MixtralConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    return transformers.MixtralForCausalLM(config)


MODELS = {"t5 v1.0": t5, "t5 v1.1": flan, "roberta": roberta, "mixtral": mixtral}


def save_random(name: str, folder) -> None:
    """A random model of `MODELS`, in float32."""
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(folder)


def theirs(folder, **options):
    """A folder in transformers, in the class that its config.json names."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", **options
    )
    for module in model.modules():
        # Else it repacks its weights at the first call, in bfloat16 (shared facts, bitsandbytes).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def their_logits(model) -> np.ndarray:
    ids = torch.from_numpy(IDS).long()
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits.numpy()


def our_logits(model) -> np.ndarray:
    ids = jnp.asarray(IDS)
    more = (ids,) if type(model).__name__ == "EncoderDecoder" else ()
    return np.asarray(nnx.jit(lambda model: model(ids, *more))(model))


def same(actual, expected) -> None:
    """Equal to float32's rounding."""
    assert np.abs(actual - expected).max() < 5e-6 * np.ptp(expected)
