"""The scores of GLUE and of Super-NaturalInstructions, through the libraries that define them.

GLUE (arXiv 1804.07461) takes Matthews' correlation for CoLA, Pearson's and Spearman's for STS-B, F1
and accuracy for MRPC and QQP, accuracy for the rest: scikit-learn and SciPy. Super-NI (arXiv
2204.07705) takes ROUGE-L with stemming, the best over an instance's references: rouge-score. All
three come with `pip install 'qlora-jax[scores]'` and are imported when a score is asked for.

Every score is a fraction; tables print 100 times as much.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Scores = dict[str, float]


def _extra(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"scores need the package that holds {error.name}: pip install 'qlora-jax[scores]'."
        ) from error


def _check(references: Sequence[Any], predictions: Sequence[Any]) -> None:
    if len(references) != len(predictions) or len(references) == 0:
        raise ValueError(
            f"{len(references)} references and {len(predictions)} predictions were given, but "
            "equally many of both, and at least one, are needed."
        )


def accuracy(references: Sequence[int], predictions: Sequence[int]) -> Scores:
    """`accuracy`: the share of equal classes."""
    _check(references, predictions)
    score = _extra("sklearn.metrics").accuracy_score(references, predictions)
    return {"accuracy": float(score)}


def accuracy_and_f1(references: Sequence[int], predictions: Sequence[int]) -> Scores:
    """`accuracy`, and `f1` of class 1 (0 where no class 1 is met or predicted)."""
    scores = accuracy(references, predictions)
    metrics = _extra("sklearn.metrics")
    return scores | {"f1": float(metrics.f1_score(references, predictions, zero_division=0.0))}


def matthews(references: Sequence[int], predictions: Sequence[int]) -> Scores:
    """`matthews`: Matthews' correlation, 0 where all predictions are one class."""
    _check(references, predictions)
    score = _extra("sklearn.metrics").matthews_corrcoef(references, predictions)
    return {"matthews": float(score)}


def correlations(references: Sequence[float], predictions: Sequence[float]) -> Scores:
    """`pearson` and `spearman`; 0 where one side is constant and no correlation exists."""
    _check(references, predictions)
    if min(len(set(references)), len(set(predictions))) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    stats = _extra("scipy.stats")
    return {
        name: float(correlation(references, predictions).statistic)
        for name, correlation in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr))
    }


def rouge_l(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> Scores:
    """`rougeL`: mean over instances of the best F-measure over the instance's references."""
    _check(references, predictions)
    scorer = _extra("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(target, prediction)["rougeL"].fmeasure for target in targets)
        for targets, prediction in zip(references, predictions, strict=True)
    ]
    return {"rougeL": math.fsum(best) / len(best)}


Metric = Callable[[Sequence[Any], Sequence[Any]], Scores]
