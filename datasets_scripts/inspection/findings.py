"""Oddities of a model: damage, dead parts, statistics unlike those of other tensors, batch norms that no data made."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from modeling_wsl.checkpoints.checkpoint import Checkpoint
from modeling_wsl.tokens.manifest import BATCH_NORM_STATISTICS, split_name

from .tensor_statistics import TensorReport


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
# A channel whose input varies by less was constant: its output is noise once divided by the root of this.
MIN_VARIANCE = 1e-10
MIN_SCALE = 1e-4  # of a channel, beside the median of its norm: what passes is next to nothing
SCALES = ("weight", "gamma", "scale")


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


def gather(oddities: Iterable[tuple[str, str, str]]) -> list[Finding]:
    """From (severity, what, where) triples: what holds in several places is said once, the most severe first."""
    places: dict[tuple[str, str], list[str]] = {}
    for severity, what, where in oddities:
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
    stats = tensor.statistics
    for count, what in ((stats.nan, "entries are NaN"), (stats.infinite, "entries are infinite")):
        if count:
            yield "damage", what, f"{tensor.name} ({count:,} of {tensor.entries:,})"
    if stats.minimum is None:
        return
    if stats.minimum == stats.maximum and tensor.entries > 1:
        yield "notable", f"all entries are {stats.minimum:g} ({tensor.kind})", tensor.name
    elif stats.dead_outputs and stats.outputs >= MIN_OUTPUTS:
        where = f"{tensor.name} ({stats.dead_outputs:,} of {stats.outputs:,})"
        yield "notable", f"outputs whose weights are all zero ({tensor.kind})", where
    largest = max(-stats.minimum, stats.maximum)
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


def batch_norm_oddities(checkpoint: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """(severity, what, where) about every module with a running mean, for `gather`.

    Args:
        checkpoint: open; of each batch norm a few tensors of one number a channel are read.
    """
    for name in checkpoint.tensors:
        prefix, leaf = split_name(name)
        if leaf not in BATCH_NORM_STATISTICS:
            continue
        module = name[: len(name) - len(leaf)]
        variance_leaf, *counter_leaf = BATCH_NORM_STATISTICS[leaf][1:]
        mean = checkpoint.read(name).double()
        if module + variance_leaf in checkpoint.tensors:
            variance = checkpoint.read(module + variance_leaf).double()
            yield from _statistics_oddities(prefix, mean, variance)
        for counter in counter_leaf:
            if module + counter in checkpoint.tensors and mean.any() and not checkpoint.read(module + counter).any():
                yield "notable", "num_batches_tracked is 0 beside running statistics that were set", prefix
        for scale_name in (module + scale for scale in SCALES):
            if scale_name in checkpoint.tensors:
                scale = checkpoint.read(scale_name).double().abs()
                off = int((scale <= MIN_SCALE * scale.median()).sum()) if scale.numel() else 0
                if off and scale.any():  # a tensor of zeros is told as such
                    what = "scales of a batch norm that are next to 0: channels that are off"
                    yield "notable", what, f"{prefix} ({off:,} of {scale.numel():,})"


def _statistics_oddities(prefix: str, mean: Tensor, variance: Tensor) -> Iterator[tuple[str, str, str]]:
    if not variance.numel():
        return
    broken = ~(mean.isfinite() & variance.isfinite()) if mean.shape == variance.shape else ~variance.isfinite()
    still = (variance >= 0) & (variance < MIN_VARIANCE)
    for severity, what, channels in (
        ("damage", "running statistics of a batch norm that are NaN or infinite", broken),
        ("damage", "negative running variances", variance < 0),
        ("notable", f"running variances below {MIN_VARIANCE:g}: channels whose input was constant", still),
    ):
        if channels.any():
            yield severity, what, f"{prefix} ({int(channels.sum()):,} of {channels.numel():,})"
    largest = float(variance[variance.isfinite()].max()) if variance.isfinite().any() else 0.0
    if largest > MAX_FLOAT16:
        yield "notable", "running variances that do not fit float16", f"{prefix} ({largest:.3g})"
    if not mean.any() and bool((variance == 1).all()):
        yield "notable", "running statistics as initialized: it never saw data in training mode", prefix
