"""Floor 4: is it any good? Token-weighted loss and perplexity."""

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
    "Evaluation",
    "LossFn",
    "causal_lm_loss",
    "evaluate",
    "make_eval_step",
    "perplexity",
    "split_adapters",
]
