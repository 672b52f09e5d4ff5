"""Floor 4: what does it say? Sampling, generation with a KV cache, chat.

generate        token ids -> token ids, batches of unequal prompts
generate_text   texts -> texts, with stop texts and streams
chat            a conversation -> the assistant's next turn
newest_turns    a conversation -> what of it has room
"""

from qlora_jax.generate.config import PAPER_SAMPLING, GenerationConfig, read_eos_token_ids
from qlora_jax.generate.decode import Generative
from qlora_jax.generate.generate import Generation, check_prompts, generate, prompt_room
from qlora_jax.generate.sampling import (
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_tokens,
    penalize_repetition,
    shaped_logits,
    with_temperature,
)
from qlora_jax.generate.text import Answer, chat, generate_text, newest_turns

__all__ = [
    "PAPER_SAMPLING",
    "Answer",
    "Generation",
    "GenerationConfig",
    "Generative",
    "chat",
    "check_prompts",
    "generate",
    "generate_text",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "newest_turns",
    "next_tokens",
    "penalize_repetition",
    "prompt_room",
    "read_eos_token_ids",
    "shaped_logits",
    "with_temperature",
]
