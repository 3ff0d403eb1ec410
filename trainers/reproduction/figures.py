"""The pictures of reproduced figures, each drawn from its result alone."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_wsl.pages import GRAY, GREEN, ORANGE, PURPLE, RED, SKY

from ..evaluation.arm_figure import ARM_STYLES
from .paper_tables import DISTRIBUTIONS, FEW_SHOT, LANGUAGE
from .result_reading import Result, arm_names, arms_of, best_backbone, over_architectures, rows_of


_BARS = (RED, ORANGE, PURPLE, SKY, GREEN, GRAY)
_CONTROLS = ("scratch", "random projection", "PCA", "anchor + noise", "anchor rotated", "anchor")


def draw_figure(result: Result) -> Figure:
    """The picture of a result, by its kind."""
    if result["kind"] == FEW_SHOT:
        return _bars(result)
    if result["kind"] == DISTRIBUTIONS:
        return _distributions(result)
    return _text_curves(result) if result["kind"] == LANGUAGE else _curves(result)


def _bars(result: Result) -> Figure:
    """Test accuracy by data set: a bar for each row of the paper, and a mark for each control."""
    rows = rows_of(result)
    datasets = list(dict.fromkeys(entry["dataset"] for entry in result["entries"]))
    figure, (axes,) = _figure(1, 2.6 + 2.0 * len(datasets), 4.2)
    width = 0.8 / len(rows)
    for number, (label, entries) in enumerate(rows.items()):
        best = [best_backbone([e for e in entries if e["dataset"] == dataset]) for dataset in datasets]
        tests = [entry["arms"]["generated"]["summary"]["test"] for entry in best]
        places = np.arange(len(datasets)) - 0.4 + (number + 0.5) * width
        deviations = [100 * (test["std"] or 0) for test in tests]
        heights = [100 * test["mean"] for test in tests]
        color = _BARS[number % len(_BARS)]
        axes.bar(places, heights, 0.9 * width, yerr=deviations, color=color, label=f"generated, {label}")
    first = [next(e for e in result["entries"] if e["dataset"] == dataset) for dataset in datasets]
    for arm in _CONTROLS:
        style = {key: ARM_STYLES[arm][key] for key in ("color", "marker")}
        points = [(i, arms_of(result, e)[arm]) for i, e in enumerate(first) if arm in arms_of(result, e)]
        values = [100 * outcome["summary"]["test"]["mean"] for _, outcome in points]
        places = [place + 0.46 for place, _ in points]
        axes.plot(places, values, linestyle="", label=arm, clip_on=False, **style)
    axes.set(ylabel="test accuracy, no fine-tuning (%)", ylim=(0, 100), xticks=range(len(datasets)))
    axes.set_xticklabels(datasets)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _curves(result: Result) -> Figure:
    """Validation accuracy over the epochs: the mean of all architectures, then each group."""
    groups = list(dict.fromkeys(entry["group"] for entry in result["entries"]))
    parts = {"all architectures": result["entries"]}
    parts |= {group: [e for e in result["entries"] if e["group"] == group] for group in groups}
    figure, panels = _figure(len(parts), 10.5, 2.7 * -(-len(parts) // 4) + 0.6, columns=4)
    for axes, (title, entries) in zip(panels, parts.items(), strict=False):
        by_row = {row: [e for e in entries if e["row"] == row] for row in rows_of(result)}
        for number, (label, own) in enumerate(by_row.items()):
            means = [value for value, _ in over_architectures(result, own, "generated")]
            color = _BARS[number % len(_BARS)]
            axes.plot(means, marker="o", markersize=4, color=color, label=f"generated, {label}")
        own = next(iter(by_row.values()))
        for arm in _CONTROLS:
            if arm in arm_names(result, own):
                style = {**ARM_STYLES[arm], "markersize": 3, "linewidth": 1.2}
                axes.plot([value for value, _ in over_architectures(result, own, arm)], label=arm, **style)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set(ylim=(0, None), xlabel="epochs")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("validation accuracy (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _text_curves(result: Result) -> Figure:
    """Loss, perplexity, accuracy and F1 on the validation text over the tokens seen."""
    entry = result["entries"][0]
    tokens = result["controls"][f"{entry['architecture']} {entry['dataset']}"]["tokens_per_example"]
    figure, panels = _figure(4, 9.0, 6.2, columns=2)
    for arm, outcome in arms_of(result, entry).items():
        points = outcome["summary"]["by_epoch"]
        style = {"linewidth": 1.5, "markersize": 3, **ARM_STYLES[arm]}
        for axes, metric in zip(panels, ("loss", "perplexity", "accuracy", "f1"), strict=True):
            values = [point["metrics"][metric]["mean"] for point in points]
            axes.plot([point["examples"] * tokens / 1e3 for point in points], values, label=arm, **style)
            axes.set_title(metric, fontsize=10, loc="left")
            axes.set_xlabel("thousand tokens seen")
            if metric == "perplexity":
                axes.set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _distributions(result: Result) -> Figure:
    """Histograms of original and reconstructed weights: a row for each backbone, a column for each kind of layer."""
    kinds = list(result["entries"][0]["kinds"])
    figure, panels = _figure(
        len(kinds) * len(result["entries"]), 3.0 * len(kinds), 2.5 * len(result["entries"]) + 0.5, columns=len(kinds)
    )
    for number, entry in enumerate(result["entries"]):
        for axes, kind in zip(panels[number * len(kinds) :], kinds, strict=False):
            counts = entry["kinds"][kind]
            axes.stairs(counts["original"], counts["edges"], color=GRAY, fill=True, alpha=0.5, label="original")
            axes.stairs(counts["reconstructed"], counts["edges"], color=RED, linewidth=1.5, label="reconstructed")
            axes.set_title(f"{entry['row']}\n{entry['architecture']}: {kind}", fontsize=8, loc="left")
            axes.set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _figure(panels: int, width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure outside of pyplot: no global state, no window system."""
    figure = Figure(figsize=(width, height), layout="constrained")
    rows = -(-panels // columns)
    made = [figure.add_subplot(rows, min(columns, panels), number + 1) for number in range(panels)]
    for axes in made:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#DDDDDD", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, made
