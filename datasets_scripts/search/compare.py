"""`hf-wsl compare`: two models, what the one is to the other, and the evidence."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_wsl.files import write_json, write_text
from hf_wsl.options import ConfigError
from hf_wsl.pages import Table, html_page
from modeling_wsl import Checkpoint, open_checkpoint
from modeling_wsl.checkpoints.canonical import canonical, same_network
from modeling_wsl.embedding.model_embedding import embed_checkpoint
from modeling_wsl.embedding.network_layers import plan_layers
from modeling_wsl.tokens.manifest import batch_norm_names, split_name

from ..embedding.embedding_table import EmbeddingTable
from .fingerprints import Closeness, FingerprintSpace
from .permutation import MATCHED_COSINE, MatchedLayer, match_neurons, mean_cosine
from .weight_relations import aligned_names


TEMPLATE = Path(__file__).parent / "compare.html"
REFERENCE_TABLE = Path(__file__).parent / "public_models.parquet"  # fingerprints of the default backbone's sources
PIECE_ENTRIES = 1 << 22
SHARED_SHARE = 0.5  # of the larger model's entries, from which two models are of one architecture
COPY_CORRELATION = 0.5  # of weights as they stand: strangers of one architecture reach 0.06 (see `near_copies`)
NEAR_CHANGE = 0.02  # relative, of casts and of noise that training does not see
ROUNDED_CHANGE = 0.3  # relative, that rounding to few values makes at most
FEW_VALUES = 256  # different values of a row that is stored in 8 bits or fewer
PRUNED_SHARE = 0.05  # of entries that are zero in one model alone
STRANGERS = ("same architecture only", "unrelated")
VERDICTS = {
    "same weights": "Every weight is equal.",
    "copy": "The weights are equal but for rounding or slight noise.",
    "pruned copy": "Weights were set to zero; the others are those of the other model.",
    "quantized copy": "The weights are those of the other model, rounded to few values.",
    "fine-tune": "The weights are the other model's, trained on; or both are of one origin.",
    "permuted or rescaled copy": "The neurons are the other model's, in another order or scale.",
    "same architecture only": "Shapes are equal, weights have nothing to do with each other.",
    "unrelated": "Neither shapes nor weights are alike.",
}


@dataclass(frozen=True)
class TensorChange:
    """A tensor that both models have.

    Attributes:
        name: in the second model's canonical view.
        entries: of each.
        change: Euclidean norm of the difference, relative to that of the first.
        correlation: of the entries as they stand; None where one is constant.
        pruned: share of entries that are zero in one model alone.
        kept_change: relative change of the entries that are zero in neither.
        is_rounded: whether the rows of one have few different values, and those of the other have not.
    """

    name: str
    entries: int
    change: float
    correlation: float | None
    pruned: float
    kept_change: float
    is_rounded: bool


@dataclass(frozen=True)
class Judgement:
    """What two models are to each other, by their weights.

    Attributes:
        verdict: a key of `VERDICTS`.
        shared_share: entries of tensors that both have, of the larger model's.
        changes: the tensors that both have, in order.
        neurons: layers whose neurons were matched, where weights are not alike as they stand.
        only_first, only_second: tensors that one has alone.
    """

    verdict: str
    shared_share: float
    changes: list[TensorChange]
    neurons: list[MatchedLayer]
    only_first: int
    only_second: int


@dataclass(frozen=True)
class Comparison:
    """Two models side by side.

    Attributes:
        first, second: their names.
        closeness: of the fingerprints.
        p_value: share of pairs of unrelated public models whose position cosine is as large, at least one of them all.
        strangers: number of these pairs.
        verdict, shared_share, changes, neurons, only_first, only_second: see `Judgement`.
    """

    first: str
    second: str
    closeness: Closeness
    p_value: float
    strangers: int
    verdict: str
    shared_share: float
    changes: list[TensorChange]
    neurons: list[MatchedLayer]
    only_first: int
    only_second: int

    @property
    def change(self) -> float:
        """Relative change of all tensors that both have, weighted by entries; NaN where there are none."""
        entries = sum(tensor.entries for tensor in self.changes)
        return sum(t.change * t.entries for t in self.changes) / entries if entries else float("nan")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"change": self.change, "meaning": VERDICTS[self.verdict]}

    def lines(self) -> Iterator[str]:
        """The verdict and its evidence as text."""
        yield f"{self.verdict}: {VERDICTS[self.verdict]}"
        yield f"  first   {self.first}"
        yield f"  second  {self.second}"
        yield from (f"  {name}: {value}" for name, value in self.evidence())
        for title, rows in (("changed most", self.most_changed()), ("changed least", self.most_changed(least=True))):
            if rows:
                yield f"  {title}: " + ", ".join(f"{t.name} ({t.change:.2g})" for t in rows)

    def evidence(self) -> Iterator[tuple[str, str]]:
        """(name, value) of the figures that the verdict rests on."""
        yield (
            "tensors",
            (
                f"{len(self.changes)} in both ({self.shared_share:.1%} of the entries), "
                f"{self.only_first} in the first alone, {self.only_second} in the second alone"
            ),
        )
        if self.changes:
            yield "relative change of the weights", f"{self.change:.3g}"
        p_value = f"p {'<' if self.p_value <= 1 / self.strangers else '='} {max(self.p_value, 1 / self.strangers):.2g}"
        yield "position cosine", f"{self.closeness.position:.3f} ({p_value}, {self.strangers:,} pairs of strangers)"
        if self.closeness.probe is not None:
            yield "probe distance", f"{self.closeness.probe:.3f} of that to unrelated neighbors"
        if self.neurons:
            moved = np.average([n.moved for n in self.neurons], weights=[n.entries for n in self.neurons])
            yield (
                "neurons in another order",
                f"{moved:.0%}; their rows then agree by cosine {mean_cosine(self.neurons):.2f}",
            )

    def most_changed(self, count: int = 3, least: bool = False) -> list[TensorChange]:
        """Matrices whose weights differ most, or least."""
        if self.verdict not in ("fine-tune", "copy"):
            return []
        return sorted(
            (t for t in self.changes if t.correlation is not None), key=lambda t: t.change * (1 - 2 * (not least))
        )[:count]

    def by_depth(self, bins: int = 5) -> list[float]:
        """Relative change from the first tensors to the last, in `bins` parts of equal numbers."""
        parts = np.array_split(np.array([t.change for t in self.changes]), min(bins, len(self.changes)))
        return [float(part.mean()) for part in parts]


def compare(first: Any, second: Any, *, table: str | PathLike | None = None, **options: Any) -> Comparison:
    """Compares two models by their canonical views, a piece of a tensor of each at a time.

    Args:
        first, second: what `open_checkpoint` reads.
        table: Parquet file of `hf-wsl embed profile`, whose models stand for strangers; by default the public models
            that come with the library.
        options: of `open_checkpoint`.

    Raises:
        CheckpointError: a model cannot be read.
        ValueError: the table cannot be read or has no fingerprints.
    """
    space = reference_space(str(table or REFERENCE_TABLE))
    with open_checkpoint(first, **options) as one, open_checkpoint(second, **options) as other:
        closeness = space.pair(*(embed_checkpoint(checkpoint) for checkpoint in (one, other)))
        judgement = judge(one, other, closeness)
        strangers = space.stranger_cosines()
        closer = len(strangers) - int(np.searchsorted(strangers, closeness.position))
        return Comparison(
            one.source, other.source, closeness, max(closer, 1) / len(strangers), len(strangers), **vars(judgement)
        )


def judge(one: Checkpoint, other: Checkpoint, closeness: Closeness) -> Judgement:
    """What two open models are to each other by their weights, and by how near their fingerprints are."""
    views = canonical(one), canonical(other)
    names = _aligned(*views)
    changes = [_change(*views, name, names[name]) for name in views[0].tensors if name in names]
    sizes = [sum(spec.numel for spec in view.tensors.values()) for view in views]
    share = sum(change.entries for change in changes) / max(*sizes, 1)
    neurons = []
    if share > SHARED_SHARE and _correlation(changes) < COPY_CORRELATION:
        neurons = _match(*views, names)
    verdict = _verdict(one, other, share, changes, neurons, closeness)
    alone = [len(view.tensors) - len(names) for view in views]
    return Judgement(verdict, share, changes, neurons, *alone)


@cache
def reference_space(table: str) -> FingerprintSpace:
    """The fingerprints of a table, read once."""
    return FingerprintSpace(EmbeddingTable.read(table))


def _aligned(first: Checkpoint, second: Checkpoint) -> dict[str, str]:
    """Name in the first view -> name in the second, of tensors of one shape: by names, or else by order."""
    names = aligned_names(first.tensors, second.tensors)
    shapes = [[spec.shape for spec in view.tensors.values()] for view in (first, second)]
    if len(names) < len(shapes[0]) / 2 and shapes[0] == shapes[1]:
        return dict(zip(first.tensors, second.tensors, strict=True))
    return names


def _change(first: Checkpoint, second: Checkpoint, name: str, other: str) -> TensorChange:
    one, two = first.read(name), second.read(other)
    first.check_finite(name, one)
    second.check_finite(other, two)
    sums = np.zeros(6)
    zeros = kept = kept_square = 0.0
    for a, b in zip(one.reshape(-1).split(PIECE_ENTRIES), two.reshape(-1).split(PIECE_ENTRIES), strict=True):
        a, b = a.double(), b.double()
        sums += [float(x) for x in (a.sum(), b.sum(), a @ a, b @ b, a @ b, (a - b) @ (a - b))]
        alone = (a == 0) != (b == 0)
        zeros += int(alone.sum())
        kept += float(((a - b).square() * ~alone).sum())
        kept_square += float((a.square() * ~alone).sum())
    entries = one.numel()
    variances = [sums[2 + i] - sums[i] ** 2 / entries for i in (0, 1)]
    correlation = None
    if one.dim() > 1 and min(variances) > 1e-12 * max(sums[2], sums[3]) > 0:
        correlation = (sums[4] - sums[0] * sums[1] / entries) / np.sqrt(variances[0] * variances[1])
    return TensorChange(
        other,
        entries,
        float(np.sqrt(sums[5] / max(sums[2], 1e-300))) if sums[5] else 0.0,
        correlation,
        zeros / entries,
        float(np.sqrt(kept / max(kept_square, 1e-300))) if kept else 0.0,
        one.dim() > 1 and _has_few_values(one) != _has_few_values(two),
    )


def _has_few_values(tensor: torch.Tensor, rows: int = 8) -> bool:
    """Whether some rows of a matrix hold few different values for their length."""
    flat = tensor.reshape(len(tensor), -1)[:rows]
    if flat.shape[1] < 2 * FEW_VALUES:  # short rows are rounded together, or tell nothing
        flat = flat.reshape(1, -1)
    counts = [len(row.unique()) for row in flat]
    return max(counts) <= min(FEW_VALUES, flat.shape[1] / 2)


def _correlation(changes: list[TensorChange]) -> float:
    """The median over matrices, each counted by its entries; 0 without matrices that vary."""
    known = sorted((c.correlation, c.entries) for c in changes if c.correlation is not None)
    if not known:
        return 0.0
    values, entries = np.array(known).T
    return float(values[np.searchsorted(entries.cumsum(), entries.sum() / 2)])


def _match(first: Checkpoint, second: Checkpoint, names: Mapping[str, str]) -> list[MatchedLayer]:
    kept = list(names)
    mine = plan_layers(first.tensors[name] for name in kept)
    yours = plan_layers(second.tensors[names[name]] for name in kept)
    pairs = [(a, b) for a, b in zip(mine, yours, strict=False) if a.shape == b.shape]
    return match_neurons(pairs, (first.read, second.read)) if len(pairs) == len(mine) == len(yours) else []


def _verdict(
    first: Checkpoint,
    second: Checkpoint,
    share: float,
    changes: list[TensorChange],
    neurons: list[MatchedLayer],
    closeness: Closeness,
) -> str:
    if same_network(first, second):
        return "same weights"
    if share <= SHARED_SHARE:
        return "fine-tune" if closeness.kind == "copy" else "unrelated"
    if _correlation(changes) < COPY_CORRELATION and closeness.kind != "copy":
        is_reordered = mean_cosine(neurons) > MATCHED_COSINE
        return "permuted or rescaled copy" if is_reordered else "same architecture only"
    entries = sum(change.entries for change in changes)

    def mean(values: Iterator[float]) -> float:
        return sum(value * change.entries for value, change in zip(values, changes, strict=True)) / entries

    change = mean(c.change for c in changes)
    rounded = sum(c.entries for c in changes if c.is_rounded) / entries
    if change < ROUNDED_CHANGE and rounded > SHARED_SHARE:
        return "quantized copy"
    if mean(c.pruned for c in changes) > PRUNED_SHARE and mean(c.kept_change for c in changes) < NEAR_CHANGE:
        return "pruned copy"
    if share == 1 and max((c.change for c in changes if not _is_statistic(c.name, second)), default=0) <= NEAR_CHANGE:
        return "copy"
    if neurons and mean_cosine(neurons) > MATCHED_COSINE and _correlation(changes) < COPY_CORRELATION:
        return "permuted or rescaled copy"
    return "fine-tune"


def _is_statistic(name: str, checkpoint: Checkpoint) -> bool:
    return split_name(name)[1] in ("running_mean", "running_var") or name in batch_norm_names(checkpoint.tensors)


def write_comparison(comparison: Comparison, path: str | PathLike) -> None:
    """Writes a comparison as a page (`.html`) or as JSON (`.json`).

    Raises:
        ConfigError: another suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        write_json(Path(path), comparison.to_json())
    elif suffix == ".html":
        write_text(Path(path), comparison_page(comparison))
    else:
        raise ConfigError(f"option 'output_file': {path} is neither .html nor .json")


def comparison_page(comparison: Comparison) -> str:
    """One self-contained page: verdict, evidence, change by depth, tensors."""
    tensors = [
        (t.name, f"{t.entries:,}", f"{t.change:.3g}", "" if t.correlation is None else f"{t.correlation:.3f}")
        for t in comparison.changes
    ]
    neurons = [(n.name, f"{n.cosine:.2f}", f"{n.moved:.0%}", f"{n.rescaled:.2f}") for n in comparison.neurons]
    return html_page(
        TEMPLATE,
        title=f"{comparison.verdict}",
        comparison=comparison,
        meaning=VERDICTS[comparison.verdict],
        evidence=Table(("evidence", ""), list(comparison.evidence()), 2),
        depth=comparison.by_depth() if comparison.changes else [],
        tensors=Table(("tensor", "entries", "relative change", "correlation"), tensors),
        neurons=Table(("layer", "cosine", "moved", "rescaled"), neurons) if neurons else None,
    )
