"""The picture of a collection's composition, after the paper's Figure 1."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hf_wsl.files import replacing

from ..schema import ACCEPTED
from .composition_rules import CONVNET, GROUPS, HYBRID, OTHER, TRANSFORMER, UNKNOWN
from .composition_table import Share, family_shares, merge_rest, training_data_shares


FIGURE_FILE = "composition.png"
BARS = 14  # what can be read at the width of a card
NAME_LENGTH = 22
GRAY, DARK = "#8A8A8A", "#4D4D4D"
# From the palette of Okabe and Ito, which color-blind eyes tell apart; in gray they get lighter from left to right.
COLORS = {
    TRANSFORMER: "#0072B2",
    CONVNET: "#D55E00",
    HYBRID: "#009E73",
    OTHER: "#E69F00",
    UNKNOWN: "#BBBBBB",
    "": DARK,
}


def composition_figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws which share of the models is of which group and family, and what they were trained on.

    The same rows and the same matplotlib give the same bytes.

    Args:
        rows: of the config `models`, without their manifests; at least one accepted.
        path: of the PNG file, written whole or not at all.
    """
    families = merge_rest(family_shares(rows), BARS)
    data = merge_rest(training_data_shares(rows), BARS)
    slots = max(len(families), len(data), 3)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "font.size": 12}):
        figure = Figure(figsize=(10.5, 1.5 + 0.36 * slots), layout="constrained")
        left, right = figure.subplots(1, 2)
        names = [f"other {s.group}s" if s.name == "other" and s.group != OTHER else s.name for s in families]
        _bars(left, names, families, [COLORS[s.group] for s in families], slots)
        _bars(
            right, [s.name for s in data], data, [COLORS[UNKNOWN] if s.name == UNKNOWN else DARK for s in data], slots
        )
        left.set_title("Architecture family", loc="left", weight="bold")
        right.set_title("Trained on", loc="left", weight="bold")
        figure.suptitle(_headline(rows), x=0.01, ha="left", fontsize=13)
        groups = _group_shares(rows)
        handles = [Patch(color=COLORS[group], label=f"{group} {share:.1%}") for group, share in groups.items()]
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False)
        with replacing(path) as temporary:
            # Without matplotlib's version, the only entry of the metadata that is written by default.
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})


def _headline(rows: Sequence[Mapping[str, Any]]) -> str:
    accepted = [row for row in rows if row["status"] == ACCEPTED]
    parameters = sum(row["num_parameters"] for row in accepted)
    units = {"billion": 1e9, "million": 1e6, "thousand": 1e3}
    unit = next((unit for unit, size in units.items() if parameters >= size), None)
    number = f"{parameters / units[unit]:.1f} {unit}" if unit else f"{parameters}"
    return f"{len(accepted):,} {'model' if len(accepted) == 1 else 'models'}, {number} parameters"


def _group_shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    shares = family_shares(rows)
    return {
        group: sum(s.share for s in shares if s.group == group)
        for group in GROUPS
        if any(s.group == group for s in shares)
    }


def _bars(axes: Axes, names: Sequence[str], shares: Sequence[Share], colors: Sequence[str], slots: int) -> None:
    places = range(len(shares))
    axes.barh(places, [share.share for share in shares], color=colors, height=0.72)
    short = [name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…" for name in names]
    axes.set_yticks(places, short, parse_math=False)
    axes.set_ylim(slots - 0.4, -0.6)  # the first on top, and bars as thick as those of the other half
    for place, share in zip(places, shares, strict=True):
        axes.annotate(
            f"{share.share:.1%}  ({share.models:,})",
            (share.share, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=DARK,
        )
    axes.set_xlim(0, 1.6 * max(share.share for share in shares))  # room for the numbers
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
