"""How well models of other authors are told by few numbers: codes without training, the paper's recipe, ours.

    python benchmarks/representation.py MODELS --dataset TOKENS --backbone "paper's recipe=FOLDER" \\
        --backbone "ours=FOLDER" --output results/representation.json --figure results/representation.png

MODELS is the folder that `hf-wsl tokenize` made TOKENS of. Its validation split is measured, whose owners have no
model among the training windows that PCA and the backbones (folders of `hf-wsl pretrain`) saw. Every code gets the
same budget, so many numbers for each token of 230 weights, and all it stores is counted: token statistics, bases,
counts, indices. A backbone is measured at the budget that its `latent_size` is; give a name twice for two budgets.

Measured: R2, each token in units of its own deviation; for each layer, |x - y|^2 / |x|^2 of the weights as they are
(median, mean, mean by weights, and of all weights as if they were one layer); R2 by kind and size of the layer.
Intervals: 95 %, owners resampled.

A budget of numbers means something only for codes that survive a small change of every number. Where exact bits count
a number may be an index: with the 24 bits of a float32, a codebook of pairs of weights would reach R2 0.99 at half a
number a weight. So the share of numbers that are indices or counts is told, and R2 after all others are rounded to
bfloat16, and with noise on them (see `weight_codes.Encoded`). `largest entries` shows what an index buys.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out_models import LAYER_KINDS, LAYER_SIZES, HeldOutModel, check_unseen, read_held_out, size_class
from representation_figure import draw_r2_by_budget, draw_r2_by_cost
from tqdm.auto import tqdm
from training_cost import pca_cost, training_cost
from weight_codes import STATISTICS, Encoded, backbone_code, largest_entries, matrix_svd, projection_code, window_svd

from datasets_scripts.embedding.linear_projection import LinearBaseline, random_projection
from hf_wsl.files import replacing, write_json
from modeling_wsl import WSLConfig, WSLModel
from modeling_wsl.backbone.losses import R2Accumulator
from trainers.data.windows.dataset_source import DatasetSource
from trainers.data.windows.window_data import WindowDataset
from trainers.pretraining.baselines import fit_pca
from trainers.pretraining.pretrain_setup import FACTS_FILE


RESAMPLES = 10_000
Code = Callable[[HeldOutModel], Encoded]


@dataclass(frozen=True)
class Score:
    """A code's sums over one model, float64.

    Args:
        layers: [layers, 4]: residual and total of R2, squared error and squared norm of the weights.
        rounded, noisy: [2], residual and total of R2.
        seconds: to "encode", a few percent of it for the scales of the noise, and to "decode".
    """

    layers: np.ndarray
    rounded: np.ndarray
    noisy: np.ndarray
    numbers: int
    indices: int
    seconds: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--backbone", action="append", default=[], metavar="NAME=FOLDER", help="May be repeated.")
    parser.add_argument("--budgets", nargs="+", type=int, default=[32, 64, 128, 192])
    parser.add_argument("--window-size", type=int, default=512, help="Of window SVD and of the untrained matrix code.")
    parser.add_argument("--noise", type=float, default=0.05, help="Units of noise on every number.")
    parser.add_argument("--max-pca-tokens", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path, help="PNG; that of the costs is put beside it, as `.._cost.png`.")
    arguments = parser.parse_args()

    source = DatasetSource(str(arguments.dataset))
    models = read_held_out(arguments.models, arguments.dataset, source.feature_extractor())
    train = WindowDataset(source.load()["train"])
    start = time.perf_counter()
    pca = fit_pca(train, max(arguments.budgets), arguments.max_pca_tokens)
    report = {
        **settings_of(arguments),
        "token_size": train.token_size,
        "held_out": described(models),
        "training": {"PCA": pca_cost(train, arguments.max_pca_tokens, time.perf_counter() - start)},
        "codes": {},
    }
    tasks = untrained_codes(pca, arguments)
    for named in arguments.backbone:
        name, _, folder = named.rpartition("=")
        if not name or not (Path(folder) / FACTS_FILE).is_file():
            raise SystemExit(f"--backbone {named}: give NAME=FOLDER, a folder of `hf-wsl pretrain` with {FACTS_FILE}.")
        facts = json.loads((Path(folder) / FACTS_FILE).read_text())
        unseen = check_unseen(models, Path(facts["config"]["dataset"]), name)
        backbone = WSLModel.from_pretrained(folder, dtype=torch.float32).eval()
        budget = str(backbone.config.latent_size)
        tasks.append((name, budget, partial(backbone_code, backbone=backbone)))
        cost = training_cost(facts, backbone.config) | {"owners_checked": unseen}
        report["training"].setdefault(name, {})[budget] = cost
    for name, budget, code in tqdm(tasks, desc="codes"):
        bar = tqdm(models, desc=name, leave=False)
        scores = [score(code, model, arguments.noise, arguments.seed) for model in bar]
        report["codes"].setdefault(name, {})[budget] = summary(models, scores, arguments.seed)
    print(json.dumps(report, indent=1))
    if arguments.output:
        write_json(arguments.output, report)
    if arguments.figure:
        costs = arguments.figure.with_name(f"{arguments.figure.stem}_cost{arguments.figure.suffix}")
        for path, draw in ((arguments.figure, draw_r2_by_budget), (costs, draw_r2_by_cost)):
            with replacing(path) as temporary:
                draw(report).savefig(temporary, format="png", dpi=150)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    kept = ("budgets", "window_size", "noise", "seed")
    return {**{name: getattr(arguments, name) for name in kept}, "threads": torch.get_num_threads()}


def untrained_codes(pca: LinearBaseline, arguments: argparse.Namespace) -> list[tuple[str, str, Code]]:
    """Name, budget and code of each."""
    size, window_size, tasks = pca.components.shape[1], arguments.window_size, []
    for budget in arguments.budgets:
        rank = budget - STATISTICS
        own_pca = LinearBaseline(pca.components[:rank], pca.mean)
        of_budget: dict[str, Code] = {
            "random projection": partial(projection_code, projection=random_projection(rank, size, arguments.seed)),
            "PCA": partial(projection_code, projection=own_pca),
            "largest entries": partial(largest_entries, budget=budget),
            "window SVD": partial(window_svd, budget=budget, window_size=window_size),
            "matrix SVD": partial(matrix_svd, budget=budget, otherwise=own_pca),
            "matrix code": partial(backbone_code, backbone=untrained_matrix_code(size, budget, window_size)),
        }
        tasks += [(name, str(budget), code) for name, code in of_budget.items()]
    return sorted(tasks, key=lambda task: list(of_budget).index(task[0]))


def untrained_matrix_code(token_size: int, budget: int, window_size: int) -> WSLModel:
    """Its network is small, for before training it corrects nothing."""
    config = WSLConfig(
        latent_code="matrix",
        token_standardization=True,
        token_size=token_size,
        latent_size=budget,
        window_size=window_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    return WSLModel(config).eval()


def score(code: Code, model: HeldOutModel, noise: float, seed: int) -> Score:
    start = time.perf_counter()
    encoded = code(model)
    middle = time.perf_counter()
    reconstruction = encoded.decode(encoded.parts)
    seconds = {"encode": middle - start, "decode": time.perf_counter() - middle}
    rounded = encoded.decode(encoded.rounded())
    noisy = encoded.decode(encoded.noisy(noise, torch.Generator().manual_seed(seed)))
    everything = slice(0, len(model.tokens))
    return Score(
        np.stack([layer_sums(model, reconstruction, place) for _, place in model.layers]),
        r2_sums(model, rounded, everything),
        r2_sums(model, noisy, everything),
        encoded.numbers,
        encoded.indices,
        seconds,
    )


def r2_sums(model: HeldOutModel, reconstruction: torch.Tensor, place: slice) -> np.ndarray:
    accumulator = R2Accumulator()
    accumulator.update(reconstruction[place], model.tokens[place], model.token_mask[place])
    return accumulator.state().numpy()


def layer_sums(model: HeldOutModel, reconstruction: torch.Tensor, place: slice) -> np.ndarray:
    """float64 [4], see `Score`."""
    mask, tokens = model.token_mask[place], model.tokens[place].double()
    error = torch.where(mask, reconstruction[place].double() - tokens, 0).square().sum()
    norm = torch.where(mask, tokens, 0).square().sum()
    return np.array([*r2_sums(model, reconstruction, place), float(error), float(norm)])


def summary(models: Sequence[HeldOutModel], scores: Sequence[Score], seed: int) -> dict[str, Any]:
    weights = sum(model.num_weights for model in models)
    layers = np.concatenate([found.layers for found in scores])
    sizes = np.array(layer_sizes(models))
    owners = np.array([model.owner for model in models])
    names = sorted(set(owners))
    of_model = np.stack([found.layers[:, :2].sum(0) for found in scores])
    of_owner = np.stack([of_model[owners == name].sum(0) for name in names])
    has_norm = layers[:, 3] > 0
    errors, counted = layers[has_norm, 2] / layers[has_norm, 3], sizes[has_norm]
    return {
        "r2": r2(of_owner.sum(0)),
        "interval": interval(of_owner, seed),
        "r2_bfloat16": r2(np.sum([found.rounded for found in scores], axis=0)),
        "r2_noise": r2(np.sum([found.noisy for found in scores], axis=0)),
        "numbers_per_weight": sum(found.numbers for found in scores) / weights,
        "share_of_indices": sum(f.indices for f in scores) / sum(f.numbers for f in scores),
        "relative_error": {
            "median": float(np.median(errors)),
            "mean": float(errors.mean()),
            "weighted": float((errors * counted).sum() / counted.sum()),
            "all_together": float(layers[:, 2].sum() / layers[:, 3].sum()),  # what a loss without normalization sees
        },
        "r2_by_kind": grouped_r2(layers, [kind for model in models for kind in model.layer_kinds()], LAYER_KINDS),
        "r2_by_size": grouped_r2(layers, list(map(size_class, sizes)), LAYER_SIZES),
        "r2_by_owner": {name: r2(sums) for name, sums in zip(names, of_owner, strict=True)},
        "seconds": {name: sum(found.seconds[name] for found in scores) for name in ("encode", "decode")},
    }


def r2(sums: np.ndarray) -> float | None:
    """Of residual and total; None where no token varies."""
    return float(1 - sums[0] / sums[1]) if sums[1] > 0 else None


def interval(of_owner: np.ndarray, seed: int) -> list[float]:
    """95 %, owners resampled with all their models: the same draws for every code."""
    drawn = np.random.default_rng(seed).integers(0, len(of_owner), (RESAMPLES, len(of_owner)))
    sums = of_owner[drawn].sum(1)
    return np.quantile(1 - sums[:, 0] / sums[:, 1], [0.025, 0.975]).tolist()


def grouped_r2(layers: np.ndarray, groups: Sequence[str], order: Sequence[str]) -> dict[str, float | None]:
    groups = np.array(groups)
    return {name: r2(layers[groups == name, :2].sum(0)) for name in order if (groups == name).any()}


def layer_sizes(models: Sequence[HeldOutModel]) -> list[int]:
    return [sum(spec.numel for spec in layer.tensors) for model in models for layer, _ in model.layers]


def described(models: Sequence[HeldOutModel]) -> dict[str, Any]:
    """How much was measured, and of which kinds and sizes."""
    sizes = layer_sizes(models)
    kinds = [kind for model in models for kind in model.layer_kinds()]

    def counts(groups: Sequence[str], order: Sequence[str]) -> dict[str, dict[str, int]]:
        held = {name: [size for size, group in zip(sizes, groups, strict=True) if group == name] for name in order}
        return {name: {"layers": len(own), "weights": sum(own)} for name, own in held.items() if own}

    return {
        "models": len(models),
        "owners": len({model.owner for model in models}),
        "tokens": sum(len(model.tokens) for model in models),
        "weights": sum(model.num_weights for model in models),
        "layers": len(sizes),
        "by_kind": counts(kinds, LAYER_KINDS),
        "by_size": counts(list(map(size_class, sizes)), LAYER_SIZES),
    }


if __name__ == "__main__":
    main()
