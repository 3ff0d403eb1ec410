"""An inspection in words and rows: the same for the terminal and for the page; and the text for the terminal."""

from dataclasses import dataclass

from hf_wsl.pages import Table
from modeling_wsl.tokens.manifest import split_name

from .model_inspection import ModelInspection
from .tensor_statistics import TensorReport


MAX_NAMES = 8  # of the tensors that one finding is about
MAX_NAME = 80  # characters of each of them
MAX_TEXT = 800
MAX_CELL = 72  # characters of a cell in the terminal
MAX_OWN_DISTANCE = 5e-5  # what is nearer is printed as 0.0000
METHODS = ("backbone", "pca", "random projection")


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        about: what the rows are of, or why there are none.
        table: its rows; None where there are none.
    """

    about: str
    table: Table | None = None


def printable(text: object, length: int = MAX_TEXT) -> str:
    """Text of unknown origin without control characters, at most `length` characters of it."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def number(value: float | None, digits: int = 3) -> str:
    """A number in few characters; a dash for None."""
    return "–" if value is None else f"{value:.{digits}g}"


def shape_of(shape: tuple[int, ...]) -> str:
    """Such as `64×3×7×7`."""
    return "×".join(map(str, shape)) or "scalar"


def identity(inspection: ModelInspection) -> list[tuple[str, str]]:
    """Label and value of what the model is."""
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
    rows += [
        ("format", f"{inspection.file_format}, {inspection.file_bytes:,} bytes"),
        ("parameters", f"{inspection.num_parameters:,}"),
        ("tensors", f"{inspection.num_tensors:,} ({dtypes}) in {layers}{tied}"),
        ("tokens", f"{cut}, {inspection.padding:.1%} padding; {len(inspection.carried)} tensors carried beside them"),
    ]
    rows += [("dequantized", f"{count} tensors stored as {how}") for how, count in inspection.stored_as.items()]
    if inspection.ignored:
        rows.append(("not read", "; ".join(inspection.ignored)))
    return [(label, printable(value)) for label, value in rows]


def layers(inspection: ModelInspection) -> Section:
    """A row for each tokenized tensor; a layer's tokens stand in its first row."""
    header = ["layer", "tensor", "kind", "shape"]
    header += ["tokens", "mean", "std", "kurtosis", "zeros", "norm", "spectral norm", "stable rank"]
    rows = []
    for layer in inspection.layers:
        for index, tensor in enumerate(layer.tensors):
            first = [layer.name or "(top)", f"{layer.num_tokens:,}"] if index == 0 else ["", ""]
            named = [split_name(tensor.name)[1], tensor.kind, shape_of(tensor.shape)]
            rows.append([first[0], *named, first[1], *_statistics(tensor)])
    return _section("" if rows else "No tensor is tokenized.", header, rows, text_columns=4)


def _statistics(tensor: TensorReport) -> list[str]:
    stats, spectrum = tensor.statistics, tensor.statistics.spectrum
    row = [number(stats.mean), number(stats.std), number(stats.kurtosis), f"{stats.sparsity:.1%}", number(stats.norm)]
    if spectrum is None:
        return [*row, "", ""]
    sampled = spectrum.sampled_rows is not None
    return [*row, "≥ " * sampled + number(spectrum.spectral_norm), "≈ " * sampled + number(spectrum.stable_rank)]


def carried(inspection: ModelInspection) -> Section:
    """The tensors that are not tokenized: a row for each reason and leaf name."""
    groups: dict[tuple[str, str], list[str]] = {}
    for tensor in inspection.carried:
        groups.setdefault((split_name(tensor.name)[1], tensor.reason), []).append(tensor.name)
    rows = [[leaf, reason, listed(names, 1), str(len(names))] for (leaf, reason), names in groups.items()]
    about = "" if rows else "Nothing: every tensor is tokenized."
    return _section(about, ["tensor", "reason", "of", "tensors"], rows, text_columns=3)


def findings(inspection: ModelInspection) -> Section:
    """Severity, oddity and places, the most severe first."""
    rows = [[finding.severity, finding.what, listed(finding.where)] for finding in inspection.findings]
    return _section("" if rows else "Nothing odd.", ["severity", "what", "where"], rows, text_columns=3)


def reconstruction(inspection: ModelInspection) -> Section:
    """R2 and relative error ("error") of each layer; the first row is over all."""
    result = inspection.reconstruction
    if result is None:
        reason = inspection.unusable
        return Section(printable(f"Not done: {reason}." if reason else "Pass --backbone FOLDER_OR_HUB_ID to see it."))
    methods = [method for method in METHODS if method in result.overall]
    header = ["layer", "tokens", *(f"R², {method}" for method in methods)]
    header += [f"error, {method}" for method in methods]
    tokens = {layer.name: layer.num_tokens for layer in inspection.layers}
    rows = []
    for name, fidelity, count in [
        ("all", result.overall, result.num_tokens),
        *((name or "(top)", fidelity, tokens[name]) for name, fidelity in result.layers.items()),
    ]:
        row = [name, f"{count:,}", *(decimals(fidelity[method].r2) for method in methods)]
        rows.append([*row, *(decimals(fidelity[method].relative_error) for method in methods)])
    about = f"{result.backbone}, {result.latent_size} numbers per token; so has the random projection. "
    if "pca" in methods:
        about += "PCA too, fitted on one half of this model's tokens and used on the other."
    else:
        about += "PCA is left out: this model has too few tokens to fit it on."
    return _section(about, header, rows, text_columns=1)


def neighbors(inspection: ModelInspection) -> Section:
    """The nearest models of the table."""
    result = inspection.neighbors
    if result is None:
        reason = inspection.unusable
        without = "Pass --table FILE, made by `hf-wsl embed`, to see them."
        return Section(printable(f"Not searched: {reason}." if reason else without))
    query = "its own row there" if result.own_row else "embedded now, in the same way"
    about = f"Among {result.num_models:,} models of {result.table}, embedded by {result.method}; this model: {query}."
    if result.models and result.models[0][1] < MAX_OWN_DISTANCE:
        about += " A row at distance 0.0000 is this model itself, or one of all but the same weights."
    rows = [[name, f"{distance:.4f}"] for name, distance in result.models]
    return _section(about, ["model", f"{result.metric} distance"], rows, text_columns=1)


def _section(about: str, header: list[str], rows: list[list[str]], text_columns: int) -> Section:
    """Names come from models, so that every cell is made printable here, once."""
    cells = [[printable(cell) for cell in row] for row in rows]
    return Section(printable(about), Table(header, cells, text_columns) if rows else None)


def decimals(value: float | None) -> str:
    """A share or an error to three decimals; a dash for None."""
    return "–" if value is None else f"{value:.3f}"


def listed(names: list[str], shown: int = MAX_NAMES) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(printable(name or "(top)", MAX_NAME) for name in names[:shown]) + more


def text_report(inspection: ModelInspection) -> str:
    """The inspection as text: identity, layers, tensors that are carried, reconstruction, neighbors, oddities."""
    width = max(len(label) for label, _ in identity(inspection))
    lines = [f"{label:<{width}}  {value}" for label, value in identity(inspection)]
    sections = [("Layers", layers(inspection))]
    if inspection.carried:
        sections.append(("Carried, not tokenized", carried(inspection)))
    sections += [("Reconstruction", reconstruction(inspection)), ("Nearest models", neighbors(inspection))]
    for title, section in sections:
        lines += ["", title, *([section.about] if section.about else []), *_aligned(section.table)]
    odd = findings(inspection)
    lines += ["", "Findings", *([": ".join(row) for row in odd.table.rows] if odd.table else [odd.about])]
    return "\n".join(lines)


def _aligned(table: Table | None) -> list[str]:
    if table is None:
        return []
    rows = [[_cell(cell) for cell in row] for row in [table.header, *table.rows]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = (
            cell.ljust(width) if index < table.text_columns else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  " + "  ".join(padded).rstrip())
    return lines


def _cell(text: str) -> str:
    return text if len(text) <= MAX_CELL else "…" + text[1 - MAX_CELL :]
