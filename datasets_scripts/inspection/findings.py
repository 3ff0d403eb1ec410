"""What is odd about a model's tensors: damage, dead parts, and statistics unlike those of others of their kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .model_inspection import TensorReport

SEVERITIES = ("damage", "notable", "unusual")
MAX_FLOAT16 = 65504.0
LARGE = 1000.0
MIN_OUTPUTS = 4
# Modified z-score (Iglewicz and Hoaglin 1993): distance from the median in units of 1.4826 median absolute deviations.
MAX_Z = 3.5
MAD_TO_STD = 1.4826
# A kind needs as many tensors for "usual" to mean something, and a factor of two before unusual does.
MIN_TENSORS_OF_KIND = 6
MIN_FACTOR = 2.0
MIN_ENTRIES = 64  # for statistics of a shape


@dataclass(frozen=True)
class Finding:
    """Something odd.

    Attributes:
        severity: one of SEVERITIES. "damage": such a model cannot work; "notable": dead, constant or huge parts;
            "unusual": unlike the model's other tensors.
        what: in words.
        where: tensors or modules, each with how many of its entries or what value in brackets.
    """

    severity: str
    what: str
    where: list[str]


def gather(found: Iterable[tuple[str, str, str]]) -> list[Finding]:
    """From (severity, what, where) triples: what holds in several places is said once, the most severe first."""
    places: dict[tuple[str, str], list[str]] = {}
    for severity, what, where in found:
        places.setdefault((severity, what), []).append(where)
    findings = [Finding(severity, what, names) for (severity, what), names in places.items()]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def tensor_oddities(tensors: Iterable[TensorReport]) -> Iterator[tuple[str, str, str]]:
    """(severity, what, where) about tokenized tensors, for `gather`."""
    tensors = list(tensors)
    for tensor in tensors:
        yield from _oddities(tensor)
    yield from _unusual(tensors)


def _oddities(tensor: TensorReport) -> Iterator[tuple[str, str, str]]:
    found = tensor.statistics
    for count, what in ((found.nan, "entries are NaN"), (found.infinite, "entries are infinite")):
        if count:
            yield "damage", what, f"{tensor.name} ({count:,} of {tensor.entries:,})"
    if found.minimum is None:
        return
    if found.minimum == found.maximum and tensor.entries > 1:
        yield "notable", f"all entries are {found.minimum:g} ({tensor.kind})", tensor.name
    elif found.dead_outputs and found.outputs >= MIN_OUTPUTS:
        where = f"{tensor.name} ({found.dead_outputs:,} of {found.outputs:,})"
        yield "notable", f"outputs whose weights are all zero ({tensor.kind})", where
    largest = max(-found.minimum, found.maximum)
    if largest > MAX_FLOAT16:
        yield "notable", "entries that do not fit float16", f"{tensor.name} ({largest:.3g})"
    elif largest > LARGE:
        yield "notable", f"entries larger than {LARGE:g}", f"{tensor.name} ({largest:.3g})"


def _unusual(tensors: Iterable[TensorReport]) -> Iterator[tuple[str, str, str]]:
    """Tensors with a statistic far from the median of their kind in this model, the farthest of each first."""
    by_kind: dict[str, list[TensorReport]] = {}
    for tensor in tensors:
        by_kind.setdefault(tensor.kind, []).append(tensor)
    for kind, members in by_kind.items():
        for label, measure in MEASURES.items():
            values = {tensor.name: value for tensor in members if (value := measure(tensor)) is not None and value > 0}
            if len(values) < MIN_TENSORS_OF_KIND:
                continue
            logs = {name: math.log(value) for name, value in values.items()}
            middle = median(logs.values())
            spread = MAD_TO_STD * median(abs(value - middle) for value in logs.values())
            far = {name: abs(value - middle) for name, value in logs.items()}
            usual = f"median of {len(values)}: {math.exp(middle):.3g}"
            what = f"{label} unlike that of the other tensors of kind {kind} ({usual})"
            for name in sorted(far, key=far.get, reverse=True):
                if far[name] >= math.log(MIN_FACTOR) and far[name] > MAX_Z * spread:
                    yield "unusual", what, f"{name} ({values[name]:.3g})"


def _scaled_std(tensor: TensorReport) -> float | None:
    """Standard deviation times the square root of the fan-in: about the same at every width, if initialized alike."""
    std, outputs = tensor.statistics.std, tensor.statistics.outputs
    return None if std is None or outputs is None else std * math.sqrt(tensor.entries / outputs)


def _kurtosis(tensor: TensorReport) -> float | None:
    return tensor.statistics.kurtosis if tensor.entries >= MIN_ENTRIES else None


def _rank_share(tensor: TensorReport) -> float | None:
    spectrum = tensor.statistics.spectrum
    if spectrum is None or tensor.entries < MIN_ENTRIES:
        return None
    return spectrum.stable_rank / spectrum.smaller_side


MEASURES: dict[str, Callable[[TensorReport], float | None]] = {
    "standard deviation × √fan-in": _scaled_std,
    "kurtosis": _kurtosis,
    "stable rank over the smaller side": _rank_share,
}
