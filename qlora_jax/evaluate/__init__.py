"""Floor 4: is it any good? Loss and perplexity, MMLU, scores of GLUE and Super-NI."""

from qlora_jax.evaluate.drift import Drift, drift, token_logits, windows
from qlora_jax.evaluate.losses import classifier_loss, loss_for, seq2seq_lm_loss
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
    "GROUPS",
    "LETTERS",
    "SUBJECTS",
    "Drift",
    "Evaluation",
    "LossFn",
    "Metric",
    "MmluResult",
    "Question",
    "Scores",
    "accuracy",
    "accuracy_and_f1",
    "answer_tokens",
    "causal_lm_loss",
    "classifier_loss",
    "correlations",
    "drift",
    "evaluate",
    "examine",
    "load_questions",
    "loss_for",
    "make_eval_step",
    "matthews",
    "perplexity",
    "prompt_of",
    "rouge_l",
    "seq2seq_lm_loss",
    "split_adapters",
    "token_logits",
    "windows",
]
