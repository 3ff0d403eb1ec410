"""The pictures of `representation.py`, drawn from its report alone."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from hf_wsl.pages import BLACK, BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, SKY, new_figure, tidy


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
