"""Pictures of a comparison, drawn from its record alone, in colors that color-blind eyes tell apart."""

from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_wsl.pages import BLACK, BLUE, GRAY, GREEN, OLIVE, ORANGE, PURPLE, RED, SKY, new_figure


# Color is never the only difference: arms differ in their lines and markers too.
ARM_STYLES: dict[str, dict[str, Any]] = {
    "anchor": {"color": BLACK, "linestyle": "--", "marker": "s"},
    "generated": {"color": RED, "linestyle": "-", "marker": "o", "linewidth": 2.6},
    "bootstrapped": {"color": RED, "linestyle": "-.", "marker": "p"},
    "interpolated": {"color": RED, "linestyle": ":", "marker": "h"},
    "reconstructed": {"color": ORANGE, "linestyle": "-", "marker": "D"},
    "PCA": {"color": GREEN, "linestyle": "-.", "marker": "^"},
    "random projection": {"color": PURPLE, "linestyle": "-.", "marker": "v"},
    "anchor + noise": {"color": SKY, "linestyle": ":", "marker": "P"},
    "anchor rotated": {"color": SKY, "linestyle": "-.", "marker": "<"},
    "anchor permuted": {"color": GRAY, "linestyle": ":", "marker": "X"},
    "inherited only": {"color": OLIVE, "linestyle": ":", "marker": "*"},
    "fit": {"color": RED, "linestyle": "-", "marker": "o", "linewidth": 2.6},
    "fit + head": {"color": RED, "linestyle": "-.", "marker": "p"},
    "distilled fit": {"color": RED, "linestyle": ":", "marker": "h"},
    "resize": {"color": ORANGE, "linestyle": "-", "marker": "D"},
    "weight selection": {"color": GREEN, "linestyle": "-.", "marker": "^"},
    "distilled scratch": {"color": PURPLE, "linestyle": "-.", "marker": "v"},
    "untrained donor": {"color": SKY, "linestyle": ":", "marker": "P"},
    "permuted donor": {"color": GRAY, "linestyle": ":", "marker": "X"},
    "tuned scratch": {"color": BLACK, "linestyle": "--", "marker": "s"},
    "scratch": {"color": BLUE, "linestyle": "--", "marker": "o"},
}
PERCENT = ("accuracy", "f1")


def scale_of(metric: str) -> tuple[float, str]:
    """(factor, label) that a metric is shown with."""
    return (100.0, f"{metric} (%)") if metric in PERCENT else (1.0, metric)


def arm_curves(comparison: dict[str, Any]) -> Figure:
    """A metric of the validation split over fine-tuning: the mean of the seeds as a line, each seed as a small mark.

    Args:
        comparison: `arms` as `run_arms` returns them, `metric`, optionally `tokens_per_example` (the axis then counts
            tokens, else epochs) and `guess` (what guessing reaches).
    """
    factor, label = scale_of(comparison["metric"])
    tokens = comparison.get("tokens_per_example")
    figure, axes = new_figure(8.6, 4.8)
    for arm, outcome in comparison["arms"].items():
        style = {"linewidth": 1.7, **ARM_STYLES[arm]}
        points = outcome["summary"]["by_epoch"]
        x = [point["examples"] * tokens / 1e6 if tokens else point["epoch"] for point in points]
        axes.plot(x, [factor * point["mean"] for point in points], markersize=5, label=arm, **style)
        curves = [
            [factor * point["metrics"][comparison["metric"]] for point in run["history"]] for run in outcome["runs"]
        ]
        for curve in curves if len(curves) > 1 else ():
            axes.plot(x, curve, linestyle="", marker="_", markersize=7, color=style["color"], alpha=0.6)
    axes.set(xlabel="training tokens (millions)" if tokens else "epochs of fine-tuning", ylabel=f"validation {label}")
    if not tokens:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if factor == 100.0:
        axes.set_ylim(0, min(102.0, 1.08 * axes.dataLim.y1 + 1))
        if comparison.get("guess") is not None:
            axes.axhline(100 * comparison["guess"], color=GRAY, linewidth=0.8, label="guessing", zorder=1)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def arm_dots(comparison: dict[str, Any]) -> Figure:
    """A metric of the test split without any training: every model as a dot, the mean as a bar, ensembles as stars.

    Args:
        comparison: as for `arm_curves`.
    """
    metric = comparison["metric"]
    factor, label = scale_of(metric)
    arms = comparison["arms"]
    figure, axes = new_figure(8.6, 0.5 * len(arms) + 1.4)
    for row, (arm, outcome) in enumerate(arms.items()):
        color = ARM_STYLES[arm]["color"]
        values = [factor * run["test"][metric] for run in outcome["runs"]]
        axes.plot(values, [row] * len(values), linestyle="", marker="o", markersize=6, color=color, alpha=0.45)
        axes.plot([mean(values)], [row], linestyle="", marker="|", markersize=20, markeredgewidth=2.2, color=color)
        for ensemble in outcome.get("ensembles", ()):
            x = factor * ensemble["test"][metric]
            axes.plot([x], [row], linestyle="", marker="*", markersize=13, color=color, markeredgecolor="white")
    axes.set(xlabel=f"test {label}, without fine-tuning", yticks=range(len(arms)), yticklabels=list(arms))
    axes.set_ylim(len(arms) - 0.5, -0.5)
    if comparison.get("guess") is not None and factor == 100.0:
        axes.axvline(100 * comparison["guess"], color=GRAY, linewidth=0.8)
    axes.set_title("dot: a model, bar: their mean, star: their ensemble, gray line: guessing", fontsize=9, loc="left")
    return figure
