"""Floor 4: is it any good? Loss and perplexity, MMLU, GLUE and Super-NI, a judge's ratings, Elo."""

from qlora_jax.evaluate.agreement import (
    RankAgreement,
    fleiss_kappa,
    order_agreement,
    rank_agreement,
)
from qlora_jax.evaluate.answers import Answer, JudgedQuestion, read_answers, read_questions
from qlora_jax.evaluate.drift import Drift, drift, token_logits, windows
from qlora_jax.evaluate.elo import Elo, Matches, MatchUnit, elo, make_matches
from qlora_jax.evaluate.endpoint import Endpoint, EndpointError, Reply, ask
from qlora_jax.evaluate.harness import Harness
from qlora_jax.evaluate.judge import Budget, JudgeReport, judge, pairings
from qlora_jax.evaluate.judge_prompts import judge_messages
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
from qlora_jax.evaluate.ratings import (
    Rating,
    Ratings,
    answer_id,
    check_systems,
    parse_choice,
    parse_scores,
    read_ratings,
    system_name,
)
from qlora_jax.evaluate.record import Record
from qlora_jax.evaluate.scores import (
    Metric,
    Scores,
    accuracy,
    accuracy_and_f1,
    correlations,
    matthews,
    rouge_l,
)
from qlora_jax.evaluate.tally import Percent, WinMatrix, percent_of, win_matrix
from qlora_jax.evaluate.text import text_batches

__all__ = [
    "GROUPS",
    "LETTERS",
    "SUBJECTS",
    "Answer",
    "Budget",
    "Drift",
    "Elo",
    "Endpoint",
    "EndpointError",
    "Evaluation",
    "Harness",
    "JudgeReport",
    "JudgedQuestion",
    "LossFn",
    "MatchUnit",
    "Matches",
    "Metric",
    "MmluResult",
    "Percent",
    "Question",
    "RankAgreement",
    "Rating",
    "Ratings",
    "Record",
    "Reply",
    "Scores",
    "WinMatrix",
    "accuracy",
    "accuracy_and_f1",
    "answer_id",
    "answer_tokens",
    "ask",
    "causal_lm_loss",
    "check_systems",
    "classifier_loss",
    "correlations",
    "drift",
    "elo",
    "evaluate",
    "examine",
    "fleiss_kappa",
    "judge",
    "judge_messages",
    "load_questions",
    "loss_for",
    "make_eval_step",
    "make_matches",
    "matthews",
    "order_agreement",
    "pairings",
    "parse_choice",
    "parse_scores",
    "percent_of",
    "perplexity",
    "prompt_of",
    "rank_agreement",
    "read_answers",
    "read_questions",
    "read_ratings",
    "rouge_l",
    "seq2seq_lm_loss",
    "split_adapters",
    "system_name",
    "text_batches",
    "token_logits",
    "win_matrix",
    "windows",
]
