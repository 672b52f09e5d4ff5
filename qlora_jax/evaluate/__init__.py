"""Floor 4: is it any good? Token-weighted loss and perplexity; a judge's ratings, Elo, agreement."""

from qlora_jax.evaluate.agreement import (
    RankAgreement,
    fleiss_kappa,
    order_agreement,
    rank_agreement,
)
from qlora_jax.evaluate.elo import Elo, Matches, MatchUnit, elo, make_matches
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
    parse_choice,
    parse_scores,
    read_ratings,
)
from qlora_jax.evaluate.scores import Percent, WinMatrix, percent_of, win_matrix

__all__ = [
    "Elo",
    "Evaluation",
    "LossFn",
    "MatchUnit",
    "Matches",
    "Percent",
    "RankAgreement",
    "Rating",
    "Ratings",
    "WinMatrix",
    "answer_id",
    "causal_lm_loss",
    "elo",
    "evaluate",
    "fleiss_kappa",
    "make_eval_step",
    "make_matches",
    "order_agreement",
    "parse_choice",
    "parse_scores",
    "percent_of",
    "perplexity",
    "rank_agreement",
    "read_ratings",
    "split_adapters",
    "win_matrix",
]
