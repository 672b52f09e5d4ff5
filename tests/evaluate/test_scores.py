"""Scores against values worked out by hand."""

import pytest

from qlora_jax.evaluate import accuracy, accuracy_and_f1, correlations, matthews, rouge_l


def test_matthews():
    # 3 true positives, 2 true negatives, 1 false positive, 2 false negatives:
    # (3·2 − 1·2) / √((3 + 1)(3 + 2)(2 + 1)(2 + 2)) = 4 / √240.
    references = [1, 1, 1, 1, 1, 0, 0, 0]
    predictions = [1, 1, 1, 0, 0, 0, 0, 1]
    assert matthews(references, predictions)["matthews"] == pytest.approx(4 / 240**0.5)
    assert matthews(references, references) == {"matthews": 1.0}
    assert matthews(references, [1] * 8) == {"matthews": 0.0}


def test_accuracy_and_f1():
    references, predictions = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
    # Precision 2/3, recall 2/3.
    scores = accuracy_and_f1(references, predictions)
    assert scores == {"accuracy": pytest.approx(0.6), "f1": pytest.approx(2 / 3)}
    assert accuracy([2, 0, 1], [2, 0, 0]) == {"accuracy": pytest.approx(2 / 3)}
    assert accuracy_and_f1([0, 0], [0, 0])["f1"] == 0.0


def test_correlations():
    # Deviations −2 … 2 (squares 10) and of [1, 3, 2, 5, 4] −2, 0, −1, 2, 1 (squares 10); products
    # 4 + 0 + 0 + 2 + 2 = 8. The values are their own ranks.
    references, predictions = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 3.0, 2.0, 5.0, 4.0]
    found = correlations(references, predictions)
    assert found == {"pearson": pytest.approx(0.8), "spearman": pytest.approx(0.8)}
    # Ranks alone are kept: Spearman stays, Pearson does not.
    bent = correlations(references, [x**3 for x in predictions])
    assert bent["spearman"] == pytest.approx(0.8)
    assert bent["pearson"] != pytest.approx(0.8, abs=1e-3)
    assert correlations(references, [2.0] * 5) == {"pearson": 0.0, "spearman": 0.0}


def test_rouge_l():
    # Longest common subsequence "the cat sat on mat", 5 of 6 and of 5 words: F = 2·5/(6 + 5).
    reference, answer = "the cat sat on the mat", "the cat sat on mat"
    assert rouge_l([[reference]], [answer]) == {"rougeL": pytest.approx(10 / 11)}
    # The best reference counts; words are compared by their stems, in any case.
    assert rouge_l([["nothing", "he walks"]], ["He walked"]) == {"rougeL": pytest.approx(1.0)}
    assert rouge_l([["a b"], ["c d"]], ["a b", ""]) == {"rougeL": pytest.approx(0.5)}


def test_unequal_numbers():
    with pytest.raises(ValueError, match="2 references and 1 predictions"):
        accuracy([1, 0], [1])
    with pytest.raises(ValueError, match="0 references and 0 predictions"):
        rouge_l([], [])
