"""The probes: ridge regression and a small network, for numbers and for classes.

Both standardize features over the rows they are fitted on, and choose their settings on other groups than those they
are measured on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import nn

from .group_folds import Fold


ALPHAS = np.logspace(-6, 9, 31)  # from none to all of the penalty, for some rows and thousands of features alike
HIDDEN_SIZE, BATCH_SIZE, LEARNING_RATE, MAX_EPOCHS, PATIENCE = 128, 128, 2e-3, 400, 40
WEIGHT_DECAYS = (1e-3, 1.0)


def ridge(features: np.ndarray, targets: np.ndarray, fold: Fold, seed: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
    """Ridge regression with an intercept; classes are regressed as one-hot vectors, and the largest output wins.

    The penalty is the one with the smallest squared error over `fold.choices`, the larger one where two are equal.

    Args:
        features: float64 `[n, d]`.
        targets: float64 `[n, k]`: numbers (k = 1) or one-hot classes.
        fold: rows to fit, choose and predict.
        seed: of no effect, nothing here is random.

    Returns:
        Predictions float64 `[len(fold.test), k]`, and the chosen `alpha`.
    """
    errors = np.zeros(len(ALPHAS))
    for fit, held in fold.choices:
        path = _ridge_path(features[fit], targets[fit], features[held], ALPHAS)
        errors += ((path - targets[held][:, None]) ** 2).sum((0, 2))
    best = len(ALPHAS) - 1 - int(errors[::-1].argmin())
    chosen = ALPHAS[best : best + 1]
    predicted = _ridge_path(features[fold.train], targets[fold.train], features[fold.test], chosen)
    return predicted[:, 0], {"alpha": float(chosen[0])}


def _ridge_path(fit: np.ndarray, targets: np.ndarray, asked: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """Predictions `[rows of asked, alphas, k]`: one decomposition serves all penalties."""
    scaler = StandardScaler().fit(fit)
    size = targets.shape[1]
    model = Ridge(np.repeat(alphas, size), solver="svd").fit(scaler.transform(fit), np.tile(targets, (1, len(alphas))))
    return model.predict(scaler.transform(asked)).reshape(len(asked), len(alphas), size)


def mlp(features: np.ndarray, targets: np.ndarray, fold: Fold, seed: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
    """One hidden layer with GELU, by AdamW; stopped, and its weight decay chosen, by the loss on held-out groups.

    It sees `fold.choices[0]` alone: what it is stopped on cannot be fitted too.

    Args, returns: as `ridge`; `weight_decay` and `epochs` are the settings.
    """
    fit, held = fold.choices[0]
    scaler = StandardScaler().fit(features[fit])
    inputs = torch.from_numpy(scaler.transform(features)).float()
    is_class = targets.shape[1] > 1
    center, scale = (0.0, 1.0) if is_class else (targets[fit].mean(), targets[fit].std() or 1.0)
    wanted = torch.from_numpy((targets - center) / scale).float()
    loss = nn.functional.cross_entropy if is_class else nn.functional.mse_loss
    runs = [_train(inputs, wanted, fit, held, loss, decay, seed) for decay in WEIGHT_DECAYS]
    best = min(range(len(runs)), key=lambda index: runs[index][0])
    _, epochs, network = runs[best]
    with torch.inference_mode():
        predicted = network(inputs[fold.test]).double().numpy()
    return predicted * scale + center, {"weight_decay": WEIGHT_DECAYS[best], "epochs": epochs}


def _train(
    inputs: torch.Tensor,
    wanted: torch.Tensor,
    fit: np.ndarray,
    held: np.ndarray,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    weight_decay: float,
    seed: int,
) -> tuple[float, int, nn.Module]:
    """The smallest loss on the held rows, after how many epochs, and the network of that moment."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(inputs.shape[1], HIDDEN_SIZE), nn.GELU(), nn.Linear(HIDDEN_SIZE, wanted.shape[1])
        )
        optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=weight_decay)
        rows, asked, answers = torch.from_numpy(fit), inputs[held], wanted[held]
        best, best_epoch, kept = float("inf"), 0, None
        for epoch in range(MAX_EPOCHS + 1):
            with torch.inference_mode():
                held_loss = float(loss(network(asked), answers))
            if kept is None or held_loss < best:
                best, best_epoch = held_loss, epoch
                kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
            if epoch - best_epoch >= PATIENCE:
                break
            for batch in rows[torch.randperm(len(rows))].split(BATCH_SIZE):
                optimizer.zero_grad()
                loss(network(inputs[batch]), wanted[batch]).backward()
                optimizer.step()
    network.load_state_dict(kept)
    return best, best_epoch, network


PROBES = {"ridge": ridge, "mlp": mlp}
