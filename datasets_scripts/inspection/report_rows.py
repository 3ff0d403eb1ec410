"""The tables of an inspection as headers and rows of text, for the terminal and the page alike."""

from typing import NamedTuple

from modeling_wsl.tokens.manifest import split_name

from .model_inspection import ModelInspection, TensorReport


MAX_NAMES = 8  # of the tensors that one finding is about
MAX_NAME = 80  # characters of each of them
MAX_TEXT = 800
MAX_OWN_DISTANCE = 5e-5  # what is nearer is printed as 0.0000
METHODS = ("backbone", "pca", "random projection")


class Table(NamedTuple):
    """The first `text_columns` columns are text, the others numbers."""

    header: list[str]
    rows: list[list[str]]
    text_columns: int


def printable(text: object, length: int = MAX_TEXT) -> str:
    """Text of unknown origin without control characters, at most `length` characters of it."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def number(value: float | None, digits: int = 3) -> str:
    """A number in few characters; a dash for None."""
    return "–" if value is None else f"{value:.{digits}g}"


def shape_of(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def identity(inspection: ModelInspection) -> list[tuple[str, str]]:
    """What the model is: label and value."""
    facts = dict(inspection.facts)
    rows = [("source", inspection.source)]
    if facts.get("source") not in (None, inspection.source, inspection.model_id):
        rows.append(("origin", facts["source"]))
    rows += [("revision", revision) for revision in [inspection.revision or facts.get("revision")] if revision]
    labels = ("owner", "license", "library", "architecture", "family", "task", "training_data", "base_model")
    rows += [(label.replace("_", " "), facts.get(label, "not stated")) for label in labels if label in facts]
    if "license" not in facts:
        rows.append(("license", "not stated"))
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in inspection.dtypes.items())
    tied = f", {len(inspection.tied)} more names tied to them" if inspection.tied else ""
    layers = f"{len(inspection.layers)} layers"
    cut = f"{inspection.num_tokens:,} of {inspection.token_size} ({inspection.tokenization})"
    return [
        *rows,
        ("format", f"{inspection.file_format}, {inspection.file_bytes:,} bytes"),
        ("parameters", f"{inspection.num_parameters:,}"),
        ("tensors", f"{inspection.num_tensors:,} ({dtypes}) in {layers}{tied}"),
        ("tokens", f"{cut}, {inspection.padding:.1%} padding; {len(inspection.carried)} tensors carried beside them"),
    ]


def layers_table(inspection: ModelInspection) -> Table:
    """A row for each tokenized tensor; a layer's tokens stand in its first row."""
    header = ["layer", "tensor", "kind", "shape"]
    header += ["tokens", "mean", "std", "kurtosis", "zeros", "norm", "spectral norm", "stable rank"]
    rows = []
    for layer in inspection.layers:
        for index, tensor in enumerate(layer.tensors):
            first = [layer.name or "(top)", f"{layer.num_tokens:,}"] if index == 0 else ["", ""]
            named = [split_name(tensor.name)[1], tensor.kind, shape_of(tensor.shape)]
            rows.append([first[0], *named, first[1], *_statistics(tensor)])
    return Table(header, rows, text_columns=4)


def _statistics(tensor: TensorReport) -> list[str]:
    found = tensor.statistics
    row = [number(found.mean), number(found.std), number(found.kurtosis), f"{found.sparsity:.1%}", number(found.norm)]
    if found.spectrum is None:
        return [*row, "", ""]
    sampled = found.spectrum.sampled_rows is not None
    return [
        *row,
        "≥ " * sampled + number(found.spectrum.spectral_norm),
        "≈ " * sampled + number(found.spectrum.stable_rank),
    ]


def carried_table(inspection: ModelInspection) -> Table:
    """What is not tokenized and why: a row for each reason and leaf name."""
    groups: dict[tuple[str, str], list[str]] = {}
    for tensor in inspection.carried:
        groups.setdefault((split_name(tensor.name)[1], tensor.reason), []).append(tensor.name)
    rows = [[leaf, why, listed(names, 1), str(len(names))] for (leaf, why), names in groups.items()]
    return Table(["tensor", "reason", "of", "tensors"], rows, text_columns=3)


def findings_table(inspection: ModelInspection) -> Table:
    """What is odd."""
    rows = [[finding.severity, finding.what, listed(finding.where)] for finding in inspection.findings]
    return Table(["severity", "what", "where"], rows, text_columns=3)


def reconstruction_table(inspection: ModelInspection) -> Table:
    """R2 and relative error ("error") of each layer; the first row is over all."""
    found = inspection.reconstruction
    methods = [method for method in METHODS if method in found.overall]
    header = ["layer", "tokens", *(f"R², {method}" for method in methods)]
    header += [f"error, {method}" for method in methods]
    tokens = {layer.name: layer.num_tokens for layer in inspection.layers}
    rows = []
    for name, fidelity, count in [
        ("all", found.overall, found.num_tokens),
        *((name or "(top)", fidelity, tokens[name]) for name, fidelity in found.layers.items()),
    ]:
        row = [name, f"{count:,}", *(decimals(fidelity[method].r2) for method in methods)]
        rows.append([*row, *(decimals(fidelity[method].relative_error) for method in methods)])
    return Table(header, rows, text_columns=1)


def neighbors_table(inspection: ModelInspection) -> Table:
    """The nearest models of the table."""
    found = inspection.neighbors
    rows = [[name, f"{distance:.4f}"] for name, distance in found.models]
    return Table(["model", f"{found.metric} distance"], rows, text_columns=1)


def pca_about(inspection: ModelInspection) -> str:
    """What PCA is fitted on, or why it is not there."""
    if "pca" not in inspection.reconstruction.overall:
        return "PCA is left out: this model has too few tokens to fit it on."
    return "PCA too, fitted on one half of this model's tokens and used on the other."


def neighbors_about(inspection: ModelInspection) -> str:
    """Where the neighbors were looked for."""
    found = inspection.neighbors
    query = "its own row there" if found.own_row else "embedded now, in the same way"
    about = f"Among {found.num_models:,} models of {found.table}, embedded by {found.method}; this model: {query}."
    if found.models and found.models[0][1] < MAX_OWN_DISTANCE:
        about += " A row at distance 0.0000 is this model itself, or one of all but the same weights."
    return about


def decimals(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def listed(names: list[str], shown: int = MAX_NAMES) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(printable(name or "(top)", MAX_NAME) for name in names[:shown]) + more
