"""Floor 3: which architectures? A decoder, an encoder–decoder, an encoder, and their losses."""

from qlora_jax.models import streaming
from qlora_jax.models.attention import AttentionName, attend, attention_for, capability_here
from qlora_jax.models.cache import Cache
from qlora_jax.models.chunked_attention import chunked_attention
from qlora_jax.models.classification_loss import ExampleLoss, classification_loss
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.encoder import EncoderClassifier
from qlora_jax.models.encoder_config import EncoderConfig, EncoderDecoderConfig
from qlora_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderCache
from qlora_jax.models.families import FAMILIES, family_of
from qlora_jax.models.families.t5 import t5_lora
from qlora_jax.models.family import Family, Slot, module_names
from qlora_jax.models.loss import (
    LOSS_CHUNK,
    TokenLoss,
    chunked_cross_entropy,
    cross_entropy,
    next_token_loss,
    next_tokens,
)
from qlora_jax.models.remat import REMAT, STREAMABLE, check_remat
from qlora_jax.models.rope import RopeConfig
from qlora_jax.models.seq2seq_loss import seq2seq_loss, shift_right
from qlora_jax.models.spread import shardings_of, spread, spread_rows
from qlora_jax.models.stack import is_stacked
from qlora_jax.models.tile import MLP_TILE
from qlora_jax.models.tokens import (
    add_tokens,
    resize_token_embeddings,
    train_rows_of,
    train_tokens,
    vocabularies,
)
from qlora_jax.models.unfreeze import unfreeze

__all__ = [
    "FAMILIES",
    "LOSS_CHUNK",
    "MLP_TILE",
    "REMAT",
    "STREAMABLE",
    "AttentionName",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "EncoderClassifier",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderCache",
    "EncoderDecoderConfig",
    "ExampleLoss",
    "Family",
    "RopeConfig",
    "Slot",
    "TokenLoss",
    "add_tokens",
    "attend",
    "attention_for",
    "capability_here",
    "check_remat",
    "chunked_attention",
    "chunked_cross_entropy",
    "classification_loss",
    "cross_entropy",
    "family_of",
    "is_stacked",
    "module_names",
    "next_token_loss",
    "next_tokens",
    "resize_token_embeddings",
    "seq2seq_loss",
    "shardings_of",
    "shift_right",
    "spread",
    "spread_rows",
    "streaming",
    "t5_lora",
    "train_rows_of",
    "train_tokens",
    "unfreeze",
    "vocabularies",
]
