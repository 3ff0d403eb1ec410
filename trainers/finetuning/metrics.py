"""The figures of a measurement, as metrics of `evaluate` that need no Hub (its own scripts do not load offline)."""

from __future__ import annotations

import math

import evaluate
import numpy as np
from datasets import Features, Value
from scipy.stats import kendalltau, rankdata
from sklearn.metrics import f1_score


class AccuracyAndMacroF1(evaluate.Metric):
    """Of predicted and true classes, integers `[N]`: the share that is right, and F1 averaged over the classes.

    A class counts in the average where it occurs among the labels or the predictions, however often.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="accuracy, and F1 averaged over the classes that occur",
            citation="",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return accuracy_and_macro_f1(np.asarray(predictions), np.asarray(references))


class R2SpearmanAndMAE(evaluate.Metric):
    """Of predicted and true numbers, `[N]`: see `regression_scores`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="explained variance R2, Spearman's and Kendall's rank correlations, mean absolute error",
            citation="",
            features=Features({"predictions": Value("float64"), "references": Value("float64")}),
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return regression_scores(np.asarray(predictions), np.asarray(references))


class LossAndPerplexity(evaluate.Metric):
    """Of cross-entropies in nats, one a prediction, `[N]`: their mean, and its exponential."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="mean cross-entropy in nats, and perplexity",
            citation="",
            features=Features({"losses": Value("float64")}),
        )

    def _compute(self, losses: np.ndarray) -> dict[str, float]:
        loss = float(np.mean(losses))
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


def classification_scores(losses: np.ndarray, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """loss (nats), perplexity, accuracy and macro F1 of N predictions.

    Args:
        losses: cross-entropies `[N]`.
        predictions, labels: classes `[N]`, integers.
    """
    loss = LossAndPerplexity(keep_in_memory=True).compute(losses=losses)
    return loss | AccuracyAndMacroF1(keep_in_memory=True).compute(predictions=predictions, references=labels)


def accuracy_and_macro_f1(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """`AccuracyAndMacroF1` without the bookkeeping of `evaluate`, for a bootstrap's thousands of calls."""
    return {
        "accuracy": float((predictions == references).mean()),
        "f1": float(f1_score(references, predictions, average="macro", zero_division=0)),
    }


def regression_scores(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """r2, spearman, kendall (tau-b) and mae (in units of the target) of N predictions.

    R2 is 1 - (squared error) / (squared error of the references' own mean): negative where that mean is better, NaN
    where the references do not vary. The rank correlations are NaN where either side does not vary.

    Args:
        predictions, references: float64 `[N]`.
    """
    variation = np.sum((references - references.mean()) ** 2)
    varies = np.ptp(references) > 0  # the mean of equal numbers is off by rounding, and so is their variation
    error = np.sum((references - predictions) ** 2)
    ranks = rankdata(predictions) - (len(predictions) + 1) / 2, rankdata(references) - (len(references) + 1) / 2
    spread = np.sqrt(np.sum(ranks[0] ** 2) * np.sum(ranks[1] ** 2))
    return {
        "r2": float(1 - error / variation) if varies and variation > 0 else math.nan,
        "spearman": float(ranks[0] @ ranks[1] / spread) if spread > 0 else math.nan,
        "kendall": float(kendalltau(predictions, references, method="asymptotic").statistic),
        "mae": float(np.abs(references - predictions).mean()),
    }
