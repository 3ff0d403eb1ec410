"""Metrics that `evaluate` computes without the Hub."""

import math

import evaluate
import numpy as np
import pytest
from sklearn.metrics import f1_score

from trainers.finetuning.metrics import AccuracyAndMacroF1, LossAndPerplexity, classification_scores, regression_scores


PREDICTED, TRUE = np.array([0, 1, 1, 2, 2, 2]), np.array([0, 1, 2, 2, 2, 5])


def test_scores_are_those_of_their_definitions():
    losses = np.array([0.5, 1.0, 1.5, 0.1, 0.2, 0.3])
    found = classification_scores(losses, PREDICTED, TRUE)
    assert found["loss"] == pytest.approx(0.6)
    assert found["perplexity"] == pytest.approx(math.exp(0.6))
    assert found["accuracy"] == pytest.approx(4 / 6)
    # class 0: 1, class 1: 2/3, class 2: 2/3, class 5, never predicted: 0
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3 + 0) / 4)


def test_a_class_that_occurs_nowhere_does_not_count():
    many = np.repeat([3, 7], 50)
    assert classification_scores(np.zeros(100), many, many)["f1"] == 1


def test_batches_added_one_by_one_give_the_same_as_all_at_once():
    metric = evaluate.combine([AccuracyAndMacroF1(keep_in_memory=True)])
    for start in (0, 2, 5):
        rows = slice(start, {0: 2, 2: 5, 5: 6}[start])
        metric.add_batch(predictions=PREDICTED[rows], references=TRUE[rows])
    assert metric.compute()["f1"] == pytest.approx(f1_score(TRUE, PREDICTED, average="macro"))


def test_a_loss_beyond_all_numbers_gives_an_infinite_perplexity_and_no_error():
    assert LossAndPerplexity(keep_in_memory=True).compute(losses=[1e6])["perplexity"] == math.inf


def test_computing_leaves_the_global_random_numbers_alone():
    np.random.seed(3)  # noqa: NPY002  the generator that `evaluate` reseeds while it computes
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    classification_scores(np.zeros(6), PREDICTED, TRUE)
    assert np.random.random() == expected  # noqa: NPY002


def test_equal_references_have_no_explained_variance_also_where_their_mean_is_rounded():
    references = np.full(6, 0.1)
    assert references.mean() != 0.1
    assert math.isnan(regression_scores(np.arange(6.0), references)["r2"])
