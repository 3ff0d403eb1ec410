"""Reads the JSON of a reproduced table: the figures of an arm, and means over architectures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from .paper_tables import LANGUAGE


Result = Mapping[str, Any]
# In the order of tables; `anchor`, the upper bound, comes last.
ARM_ORDER = (
    "scratch",
    "generated",
    "bootstrapped",
    "interpolated",
    "prior",
    "reconstructed",
    "PCA",
    "random projection",
    "anchor + noise",
    "anchor rotated",
    "anchor permuted",
    "inherited only",
    "anchor",
)
# What a generated model must beat for the backbone to have helped.
RIVALS = ("scratch", "random projection", "PCA", "anchor + noise", "anchor rotated", "anchor permuted")


def arms_of(result: Result, entry: Mapping[str, Any]) -> dict[str, Any]:
    """All arms of an entry, those that its backbone shares with others included."""
    shared = result["controls"][f"{entry['architecture']} {entry['dataset']}"]["arms"]
    arms = {**shared, **entry["arms"]}
    return {arm: arms[arm] for arm in ARM_ORDER if arm in arms}


def arm_names(result: Result, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The arms that any of the entries has."""
    present = {arm for entry in entries for arm in arms_of(result, entry)}
    return [arm for arm in ARM_ORDER if arm in present]


def rows_of(result: Result) -> dict[str, list[Mapping[str, Any]]]:
    """Row label -> its entries."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for entry in result["entries"]:
        rows.setdefault(entry["row"], []).append(entry)
    return rows


def best_backbone(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The entry whose generated models are best on the validation split; the paper shows the better one of two."""

    def value(entry: Mapping[str, Any]) -> float:
        arm = entry["arms"].get("generated")  # it may have diverged
        return arm["summary"]["by_epoch"][0]["mean"] if arm else -1.0

    return max(entries, key=value)


def percent_by_epoch(arm: Mapping[str, Any]) -> list[float]:
    """Mean over seeds of the main figure at every measurement, in percent."""
    return [100 * point["mean"] for point in arm["summary"]["by_epoch"]]


def over_architectures(
    result: Result, entries: Sequence[Mapping[str, Any]], arm: str
) -> list[tuple[float, float | None]]:
    """Mean and deviation over the entries at every measurement, in percent; [] unless all of them have the arm."""
    by_entry = [arms_of(result, entry) for entry in entries]
    if not all(arm in arms for arms in by_entry):
        return []  # a mean over other architectures would not compare
    curves = [percent_by_epoch(arms[arm]) for arms in by_entry]
    return [(mean(values), stdev(values) if len(values) > 1 else None) for values in zip(*curves, strict=True)]


def wins(result: Result, entries: Sequence[Mapping[str, Any]], rival: str, point: int | None) -> tuple[int, int]:
    """(entries whose generated arm is better than the rival at a measurement, entries that have both arms).

    Args:
        point: index of the measurement; None: on the test split.
    """

    sign = -1 if result["kind"] == LANGUAGE else 1  # a loss

    def value(arm: Mapping[str, Any]) -> float:
        return sign * (arm["summary"]["test"]["mean"] if point is None else percent_by_epoch(arm)[point])

    pairs = [
        (value(arms["generated"]), value(arms[rival]))
        for arms in (arms_of(result, entry) for entry in entries)
        if rival in arms and "generated" in arms
    ]
    return sum(own > other for own, other in pairs), len(pairs)
