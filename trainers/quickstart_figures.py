"""The pictures of the quickstart, each drawn from its results alone, in colours that colour-blind eyes tell apart."""

from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


# The palette of Okabe and Ito.
BLACK, GREY = "#000000", "#8A8A8A"
BLUE, SKY, GREEN, YELLOW, ORANGE, RED, PURPLE = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
)
# Colour is never the only difference: families differ in their markers too, arms in their lines.
FAMILY_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FAMILY_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, GREY)
ARM_STYLES: dict[str, dict[str, Any]] = {
    "anchor": {"color": BLACK, "linestyle": "--", "marker": "s"},
    "generated": {"color": RED, "linestyle": "-", "marker": "o", "linewidth": 2.6},
    "reconstructed": {"color": ORANGE, "linestyle": "-", "marker": "D"},
    "PCA": {"color": GREEN, "linestyle": "-.", "marker": "^"},
    "random projection": {"color": PURPLE, "linestyle": "-.", "marker": "v"},
    "anchor + noise": {"color": SKY, "linestyle": ":", "marker": "P"},
    "anchor permuted": {"color": GREY, "linestyle": ":", "marker": "X"},
    "inherited only": {"color": "#5B5B00", "linestyle": ":", "marker": "*"},
    "scratch": {"color": BLUE, "linestyle": "--", "marker": "o"},
}


def r2_curve(results: dict[str, Any]) -> Figure:
    """R2 on the validation models over the steps of pretraining, between the two lines that need no training."""
    pretrain = results["pretrain"]
    steps = [point["step"] for point in pretrain["val_r2_history"]]
    values = [point["val_r2"] for point in pretrain["val_r2_history"]]
    figure, axes = _figure(6.6, 3.9)
    axes.plot(
        steps, values, color=RED, marker="o", markersize=4, linewidth=2.2, label="backbone (nano)", clip_on=False
    )
    lines = {"PCA": (GREEN, "-."), "random projection": (PURPLE, ":")}
    for name, value in pretrain["baselines"].items():
        colour, style = lines[name]
        axes.axhline(value, color=colour, linestyle=style, linewidth=1.8, label=f"{name} ({value:.3f})")
    axes.set(xlabel="optimiser steps", ylabel="R² per standardised token", xlim=(0, max(steps)))
    everything = [*values, *pretrain["baselines"].values()]
    # At least a tenth of the scale: a difference in the third decimal must not fill the picture.
    middle, span = (max(everything) + min(everything)) / 2, max(0.1, 1.3 * (max(everything) - min(everything)))
    axes.set_ylim(middle - span / 2, middle + span / 2)
    _legend_below(figure, axes, columns=3)
    return figure


def embedding_map(results: dict[str, Any]) -> Figure:
    """Every model of the zoo in the plane of its embedding's two largest principal components."""
    embed, held_out = results["embed"], results["zoo"]["held_out"]
    validation = set(results["tokenize"]["models"].get("validation", []))
    families = list(dict.fromkeys(model["family"] for model in embed["models"]))
    figure, axes = _figure(7.6, 4.4)
    for index, family in enumerate(families):
        members = [model for model in embed["models"] if model["family"] == family]
        for hollow in (False, True):
            points = [m["xy"] for m in members if (m["name"] in validation or m["name"] == held_out) == hollow]
            if not points:
                continue
            colour = FAMILY_COLOURS[index % len(FAMILY_COLOURS)]
            axes.scatter(
                *zip(*points, strict=True),
                marker=FAMILY_MARKERS[index % len(FAMILY_MARKERS)],
                s=64,
                facecolors="none" if hollow else colour,
                edgecolors=colour,
                linewidths=1.6,
                label=None if hollow and len(points) < len(members) else family,
                zorder=3,
            )
    x, y = next(model["xy"] for model in embed["models"] if model["name"] == held_out)
    axes.scatter([x], [y], marker="o", s=230, facecolors="none", edgecolors=BLACK, linewidths=1.2, label="held out")
    axes.set(xlabel="first principal component", ylabel="second principal component")
    axes.margins(0.12)
    figure.legend(loc="outside right upper", frameon=False, labelspacing=0.9)
    return figure


def weight_distributions(results: dict[str, Any]) -> Figure:
    """Histograms of original and reconstructed weights, a panel for each kind of layer."""
    kinds = results["generate"]["kinds"]
    figure = Figure(figsize=(8.6, 5.6), layout="constrained")
    for number, (kind, found) in enumerate(kinds.items()):
        axes = figure.add_subplot(2, 2, number + 1)
        _tidy(axes)
        edges = found["edges"]
        axes.stairs(found["original"], edges, color=BLUE, fill=True, alpha=0.35, label="original")
        axes.stairs(found["reconstructed"], edges, color=RED, linewidth=1.6, label="reconstructed")
        axes.set_yscale("log")
        axes.set(xlabel="weight", ylabel="density", xlim=(edges[0], edges[-1]))
        error = f"relative error {found['relative_error']:.2f}"
        axes.set_title(f"{kind}: {found['entries']:,} weights, {error}", fontsize=10, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if number == 0:
            handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def finetuning_curves(results: dict[str, Any]) -> Figure:
    """Validation accuracy after every epoch, the mean of the seeds as a line and each seed as a small mark."""
    arms = results["finetune"]["arms"]
    figure, axes = _figure(8.6, 4.8)
    for arm, found in arms.items():
        style = {"linewidth": 1.7, **ARM_STYLES[arm]}
        curves = [[100 * point["validation_accuracy"] for point in run["history"]] for run in found["runs"]]
        epochs = range(len(curves[0]))
        axes.plot(epochs, [mean(values) for values in zip(*curves, strict=True)], markersize=5, label=arm, **style)
        if len(curves) > 1:
            for curve in curves:
                axes.plot(epochs, curve, linestyle="", marker="_", markersize=7, color=style["color"], alpha=0.6)
    axes.axhline(10, color=GREY, linewidth=0.8)
    axes.annotate("guessing", (len(epochs) - 1, 10), xytext=(0, 3), textcoords="offset points", ha="right", color=GREY)
    axes.set(xlabel="epochs of fine-tuning", ylabel="validation accuracy (%)", ylim=(0, 102), xticks=list(epochs))
    figure.legend(loc="outside right upper", frameon=False)
    return figure


FIGURES = {
    "r2_curve": r2_curve,
    "embedding_map": embedding_map,
    "weight_distributions": weight_distributions,
    "finetuning_curves": finetuning_curves,
}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure outside of pyplot: no global state, no window system."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _tidy(axes)
    return figure, axes


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)


def _legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """Outside of the axes, where it can cover no data."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
