"""Floor 4: is it any good? Token-weighted loss and perplexity."""

from qlora_jax.evaluate.drift import Drift, drift, token_logits, windows
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
    "Drift",
    "Evaluation",
    "LossFn",
    "causal_lm_loss",
    "drift",
    "evaluate",
    "make_eval_step",
    "perplexity",
    "split_adapters",
    "token_logits",
    "windows",
]
