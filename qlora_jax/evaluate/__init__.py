"""Floor 4: is it any good? Token-weighted loss and perplexity."""

from qlora_jax.evaluate.losses import classifier_loss, loss_for, seq2seq_lm_loss
from qlora_jax.evaluate.perplexity import (
    Evaluation,
    LossFn,
    causal_lm_loss,
    evaluate,
    make_eval_step,
    perplexity,
    split_adapters,
)
from qlora_jax.evaluate.scores import (
    Metric,
    Scores,
    accuracy,
    accuracy_and_f1,
    correlations,
    matthews,
    rouge_l,
)

__all__ = [
    "Evaluation",
    "LossFn",
    "Metric",
    "Scores",
    "accuracy",
    "accuracy_and_f1",
    "causal_lm_loss",
    "classifier_loss",
    "correlations",
    "evaluate",
    "loss_for",
    "make_eval_step",
    "matthews",
    "perplexity",
    "rouge_l",
    "seq2seq_lm_loss",
    "split_adapters",
]
