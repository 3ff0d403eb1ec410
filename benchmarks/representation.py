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
from harness import machine, parser_of, publish
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from tqdm.auto import tqdm
from weight_codes import (
    LAYER_KINDS,
    LAYER_SIZES,
    STATISTICS,
    Encoded,
    HeldOutModel,
    backbone_code,
    check_unseen,
    largest_entries,
    matrix_svd,
    projection_code,
    read_held_out,
    size_class,
    window_svd,
)

from datasets_scripts.embedding.linear_projection import LinearBaseline, random_projection
from hf_wsl.files import replacing
from hf_wsl.pages import BLACK, BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, SKY, new_figure, tidy
from modeling_wsl import WSLConfig, WSLModel
from modeling_wsl.backbone.losses import R2Accumulator
from modeling_wsl.codes.registry import code_of
from trainers.data.windows.dataset_source import DatasetSource
from trainers.data.windows.window_data import WindowDataset
from trainers.pretraining.baselines import fit_pca
from trainers.pretraining.pretrain_setup import FACTS_FILE


RESAMPLES = 10_000
PASSES = 3  # a backward pass computes two products for each of the forward pass
VIEWS = 2  # of every window, both go through the model
# Color is never the only difference.
STYLES: dict[str, dict[str, Any]] = {
    "random projection": {"color": PURPLE, "linestyle": "-.", "marker": "v"},
    "PCA": {"color": GREEN, "linestyle": "-.", "marker": "^"},
    "largest entries": {"color": GRAY, "linestyle": ":", "marker": "x"},
    "window SVD": {"color": SKY, "linestyle": "--", "marker": "s"},
    "matrix SVD": {"color": BLUE, "linestyle": "--", "marker": "D"},
    "matrix code": {"color": BLACK, "linestyle": "-", "marker": "P"},
}
BACKBONES = ((GRAY, "*"), (PURPLE, "p"), (ORANGE, "h"), (RED, "o"))
TRAINED = [{"color": color, "linestyle": "-", "marker": marker} for color, marker in BACKBONES]
BUDGET = 128  # of the table and of the picture of costs
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
    parser = parser_of(__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--backbone", action="append", default=[], metavar="NAME=FOLDER", help="May be repeated.")
    parser.add_argument("--budgets", nargs="+", type=int, default=[32, 64, 128, 192])
    parser.add_argument("--window-size", type=int, default=512, help="Of window SVD and of the untrained matrix code.")
    parser.add_argument("--noise", type=float, default=0.05, help="Units of noise on every number.")
    parser.add_argument("--max-pca-tokens", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
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
    publish(report, arguments.output)
    if arguments.figure:
        costs = arguments.figure.with_name(f"{arguments.figure.stem}_cost{arguments.figure.suffix}")
        for path, draw in ((arguments.figure, draw_r2_by_budget), (costs, draw_r2_by_cost)):
            with replacing(path) as temporary:
                draw(report).savefig(temporary, format="png", dpi=150)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    kept = ("budgets", "window_size", "noise", "seed")
    return {**{name: getattr(arguments, name) for name in kept}, **machine()}


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
    layer_ids = model.positions[place][:, 1]
    accumulator.update(reconstruction[place], model.tokens[place], model.token_mask[place], layer_ids)
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


def forward_operations(config: WSLConfig, tokens: int) -> int:
    """Of the matmuls and attention of `WSLForPreTraining` for one window; a multiply-add counts as two.

    The factors of the matrix code itself, eigenvectors on the CPU, are not counted.
    """
    width, inner, latent = config.hidden_size, config.intermediate_size, config.latent_size
    content = latent - config.num_token_statistics
    into_decoder = code_of(config).decoder_size
    block = tokens * (4 * width * width + 2 * width * inner) + 2 * tokens * tokens * width
    ends = (config.token_size + content) * width + (into_decoder + config.token_size) * width
    linear = 2 * config.token_size * content if config.linear_path else 0
    into_head = latent if config.projection == "pooled" else config.window_size * latent
    head = (into_head + config.projection_size) * config.projection_size
    return 2 * (2 * config.num_hidden_layers * block + tokens * (ends + linear) + head)


def training_cost(facts: dict[str, Any], config: WSLConfig) -> dict[str, Any]:
    """Operations of a whole run, as if its tokens with weights had come in full windows, and what it ran on.

    Args:
        facts: content of training_facts.json.
    """
    windows = facts["tokens_seen"] / config.window_size
    kept = ("status", "size", "parameters", "steps", "tokens_seen", "train_tokens", "seconds", "device", "processes")
    return {
        "operations": PASSES * VIEWS * windows * forward_operations(config, config.window_size),
        **{name: facts[name] for name in kept},
    }


def pca_cost(train: WindowDataset, max_tokens: int, seconds: float) -> dict[str, Any]:
    """Of the sum of outer products; the eigenvectors of one small matrix are not counted."""
    total = int(train.num_tokens.sum())
    tokens = -(-total // max(1, -(-total // max_tokens)))  # every so-manieth, as `WindowDataset.sample` takes them
    return {"operations": 2 * tokens * train.token_size**2, "tokens_seen": tokens, "seconds": seconds}


def styles_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The last backbone, ours, in red."""
    trained = [name for name in report["codes"] if name not in STYLES]
    return STYLES | {name: TRAINED[-1 - place % len(TRAINED)] for place, name in enumerate(reversed(trained))}


def draw_r2_by_budget(report: dict[str, Any]) -> Figure:
    """A line a code, with the interval that resampled owners give."""
    figure, axes = new_figure(8.6, 4.6)
    styles = styles_of(report)
    for place, (name, budgets) in enumerate(report["codes"].items()):
        x = [int(budget) + 1.2 * (place - len(report["codes"]) / 2) for budget in budgets]  # intervals side by side
        y, spread = _shown(axes, x, list(budgets.values()))
        style = {**styles[name], "markersize": 5 if name in STYLES else 9, "zorder": 2 if name in STYLES else 3}
        axes.errorbar(x, y, yerr=spread, elinewidth=0.8, capsize=2, linewidth=1.5, label=name, **style)
    budgets = report["budgets"]
    axes.set(xlabel=f"numbers for {report['token_size']} weights", ylabel="R2 on models of other authors")
    axes.set(xticks=budgets, ylim=(0, 1))
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def draw_r2_by_cost(report: dict[str, Any]) -> Figure:
    """R2 over what training costs; a code that needs none is a horizontal line."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    _costs(panels[0], report, "operations", "floating-point operations of the training")
    _costs(panels[1], report, "seconds", "seconds of the training")
    panels[0].set_ylabel(f"R2 at {BUDGET} numbers for {report['token_size']} weights")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _costs(axes: Axes, report: dict[str, Any], cost: str, label: str) -> None:
    tidy(axes)
    styles = styles_of(report)
    for name, budgets in report["codes"].items():
        if (found := budgets.get(str(BUDGET))) is None:
            continue
        style, training = styles[name], report["training"].get(name)
        if training is None:
            axes.axhline(found["r2"], label=name, linewidth=1.3, color=style["color"], linestyle=style["linestyle"])
            continue
        spent = training if cost in training else training[str(BUDGET)]
        y, spread = _shown(axes, [spent[cost]], [found])
        mark = {"color": style["color"], "marker": style["marker"], "markersize": 8, "linestyle": "", "zorder": 3}
        axes.errorbar([spent[cost]], y, yerr=spread, elinewidth=0.8, capsize=2, label=name, **mark)
    axes.set(xscale="log", xlabel=label, ylim=(0, 1))
    axes.margins(x=0.15)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _shown(axes: Axes, x: list[float], found: list[dict[str, Any]]) -> tuple[list[float], list[list[float]]]:
    """Heights and intervals; where R2 is below 0, at the lower edge with its value beside it."""
    for place, value in zip(x, (point["r2"] for point in found), strict=True):
        if value < 0:
            above = 8 + 11 * len(axes.texts)  # one over the other, where they lie close together
            axes.annotate(f"R2 {value:.3g}", (place, 0), (6, above), textcoords="offset points", fontsize=8)
    y = [max(point["r2"], 0) for point in found]
    ends = zip(*([max(end, 0) for end in point["interval"]] for point in found), strict=True)
    return y, [[abs(end - value) for end, value in zip(side, y, strict=True)] for side in ends]


if __name__ == "__main__":
    main()
