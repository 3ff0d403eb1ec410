"""The pictures of the quickstart, each drawn from its results alone, in colors that color-blind eyes tell apart."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_wsl.pages import BLACK, BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, SKY, new_figure, tidy

from ..evaluation.arm_figure import arm_curves


# Color is never the only difference: families differ in their markers too.
FAMILY_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FAMILY_COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, GRAY)


def r2_curve(results: dict[str, Any]) -> Figure:
    """R2 on the validation models over the steps of pretraining, between the two lines that need no training."""
    pretrain = results["pretrain"]
    steps = [point["step"] for point in pretrain["val_r2_history"]]
    values = [point["val_r2"] for point in pretrain["val_r2_history"]]
    figure, axes = new_figure(6.6, 3.9)
    axes.plot(
        steps, values, color=RED, marker="o", markersize=4, linewidth=2.2, label="backbone (nano)", clip_on=False
    )
    lines = {"PCA": (GREEN, "-."), "random projection": (PURPLE, ":")}
    for name, value in pretrain["baselines"].items():
        color, style = lines[name]
        axes.axhline(value, color=color, linestyle=style, linewidth=1.8, label=f"{name} ({value:.3f})")
    axes.set(xlabel="optimizer steps", ylabel="R² per standardized token", xlim=(0, max(steps)))
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
    figure, axes = new_figure(7.6, 4.4)
    for index, family in enumerate(families):
        members = [model for model in embed["models"] if model["family"] == family]
        for hollow in (False, True):
            points = [m["xy"] for m in members if (m["name"] in validation or m["name"] == held_out) == hollow]
            if not points:
                continue
            color = FAMILY_COLORS[index % len(FAMILY_COLORS)]
            axes.scatter(
                *zip(*points, strict=True),
                marker=FAMILY_MARKERS[index % len(FAMILY_MARKERS)],
                s=64,
                facecolors="none" if hollow else color,
                edgecolors=color,
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
    for number, (kind, densities) in enumerate(kinds.items()):
        axes = figure.add_subplot(2, 2, number + 1)
        tidy(axes)
        edges = densities["edges"]
        axes.stairs(densities["original"], edges, color=BLUE, fill=True, alpha=0.35, label="original")
        axes.stairs(densities["reconstructed"], edges, color=RED, linewidth=1.6, label="reconstructed")
        axes.set_yscale("log")
        axes.set(xlabel="weight", ylabel="density", xlim=(edges[0], edges[-1]))
        error = f"relative error {densities['relative_error']:.2f}"
        axes.set_title(f"{kind}: {densities['entries']:,} weights, {error}", fontsize=10, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if number == 0:
            handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def finetuning_curves(results: dict[str, Any]) -> Figure:
    """Validation accuracy after every epoch, for all arms."""
    return arm_curves(results["finetune"])


FIGURES = {
    "r2_curve": r2_curve,
    "embedding_map": embedding_map,
    "weight_distributions": weight_distributions,
    "finetuning_curves": finetuning_curves,
}


def _legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """Outside of the axes, where it can cover no data."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
