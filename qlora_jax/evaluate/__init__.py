"""Floor 4: is it any good? Token-weighted loss and perplexity, MMLU."""

from qlora_jax.evaluate.drift import Drift, drift, token_logits, windows
from qlora_jax.evaluate.mmlu import MmluResult, answer_tokens, examine
from qlora_jax.evaluate.mmlu_questions import (
    GROUPS,
    LETTERS,
    SUBJECTS,
    Question,
    load_questions,
    prompt_of,
)
from qlora_jax.evaluate.perplexity import (
    Evaluation,
    LossFn,
    causal_lm_loss,
    evaluate,
    make_eval_step,
    perplexity,
    split_adapters,
)

__all__ = [
    "GROUPS",
    "LETTERS",
    "SUBJECTS",
    "Drift",
    "Evaluation",
    "LossFn",
    "MmluResult",
    "Question",
    "answer_tokens",
    "causal_lm_loss",
    "drift",
    "evaluate",
    "examine",
    "load_questions",
    "make_eval_step",
    "perplexity",
    "prompt_of",
    "split_adapters",
    "token_logits",
    "windows",
]
