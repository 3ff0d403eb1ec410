"""The figures of a measurement, as metrics of `evaluate` that need no Hub (its own scripts do not load offline)."""

from __future__ import annotations

import math

import evaluate
import numpy as np
from datasets import Features, Value
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
        predictions, references = np.asarray(predictions), np.asarray(references)
        return {
            "accuracy": float((predictions == references).mean()),
            "f1": float(f1_score(references, predictions, average="macro", zero_division=0)),
        }


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
