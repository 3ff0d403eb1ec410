"""An inspection as one self-contained HTML page: no network, no scripts; all that comes from a model is escaped."""

import math
from html import escape
from os import PathLike
from pathlib import Path
from string import Template

from hf_wsl.files import write_text

from .findings import MAX_Z, MIN_FACTOR, MIN_TENSORS_OF_KIND
from .model_inspection import LayerReport, ModelInspection
from .report_rows import (
    METHODS,
    Table,
    carried_table,
    findings_table,
    identity,
    layers_table,
    neighbors_about,
    neighbors_table,
    number,
    pca_about,
    printable,
    reconstruction_table,
    shape_of,
)
from .tensor_statistics import CENTRAL_STDS, MAX_SPECTRUM_ENTRIES, Histogram


TEMPLATE = Path(__file__).parent / "page.html"
MIN_DRAWN_ENTRIES = 64  # of fewer a histogram shows nothing
HEAVY_TAILS = 6.0  # kurtosis from which counts are drawn on a logarithmic scale
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
# Color is never the only difference.
METHOD_MARKS = {"backbone": (ORANGE, ""), "pca": (GREEN, "5 3"), "random projection": (BLUE, "1.5 3")}


def write_page(inspection: ModelInspection, path: str | PathLike) -> None:
    """Writes the page; see `hf_wsl.files.replacing`."""
    write_text(Path(path), html_page(inspection))


def html_page(inspection: ModelInspection) -> str:
    """The page as text."""
    parameters, layers = f"{inspection.num_parameters:,}", len(inspection.layers)
    lead = f"{parameters} parameters in {inspection.num_tensors:,} tensors, {layers} layers with weights."
    rows = "".join(f"<dt>{_text(label)}</dt><dd>{_text(value)}</dd>" for label, value in identity(inspection))
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=_text(inspection.model_id),
        lead=lead,
        identity=rows,
        findings=_table(findings_table(inspection), mark_rows=True) or "<p>Nothing odd.</p>",
        max_z=f"{MAX_Z:g}",
        min_factor=f"{MIN_FACTOR:g}",
        min_tensors=MIN_TENSORS_OF_KIND,
        central=CENTRAL_STDS,
        heavy=f"{HEAVY_TAILS:g}",
        min_drawn=MIN_DRAWN_ENTRIES,
        histograms="".join(_histogram_figure(layer) for layer in inspection.layers),
        layers=_table(layers_table(inspection)) or "<p>No tensor is tokenized.</p>",
        max_spectrum=f"{MAX_SPECTRUM_ENTRIES:,}",
        carried=_table(carried_table(inspection)) or "<p>Nothing: every tensor is tokenized.</p>",
        reconstruction=_reconstruction(inspection),
        neighbors=_neighbors(inspection),
    )


def _text(value: object) -> str:
    return escape(printable(value))


def _table(table: Table, mark_rows: bool = False) -> str:
    """Empty without rows; `mark_rows` makes the first cell the row's class."""
    if not table.rows:
        return ""

    def cells(row: list[str], tag: str) -> str:
        classes = ("" if index < table.text_columns else " class=n" for index in range(len(row)))
        return "".join(f"<{tag}{style}>{_text(cell)}</{tag}>" for style, cell in zip(classes, row, strict=True))

    body = "".join(
        f"<tr{f' class={_text(row[0])}' if mark_rows else ''}>{cells(row, 'td')}</tr>" for row in table.rows
    )
    head = cells(table.header, "th")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _histogram_figure(layer: LayerReport) -> str:
    tensor = layer.main_tensor
    found = tensor.statistics.histogram
    if found is None or tensor.entries < MIN_DRAWN_ENTRIES:
        return ""
    heavy = (tensor.statistics.kurtosis or 0) > HEAVY_TAILS
    name = _text(tensor.name).replace(".", ".<wbr>").replace("/", "/<wbr>")  # where a line may break
    caption = f"<b>{name}</b><br>{_text(tensor.kind)}, {shape_of(tensor.shape)}"
    if found.outside:
        caption += f"; {found.outside:,} farther out"
    return f"<figure>{histogram_svg(found, heavy)}<figcaption>{caption}</figcaption></figure>"


def histogram_svg(histogram: Histogram, logarithmic: bool) -> str:
    """Bars, with the ends of the range below them."""
    width, height = 200, 64
    heights = [math.log1p(count) if logarithmic else count for count in histogram.counts]
    step, top = width / len(heights), max(heights)
    path = "".join(
        f"M{index * step:.1f} {height}v-{height * value / top:.1f}h{step:.1f}V{height}"
        for index, value in enumerate(heights)
        if value
    )
    return (
        f'<svg viewBox="0 0 {width} {height + 12}" role="img" aria-label="histogram">'
        f'<path d="{path}" fill="{ORANGE if logarithmic else BLUE}" fill-opacity=".75"/>'
        f'<path d="M0 {height}H{width}" stroke="#555" stroke-width=".8"/>'
        f'<text x="0" y="{height + 10}">{number(histogram.low)}</text>'
        f'<text x="{width}" y="{height + 10}" text-anchor="end">{number(histogram.high)}</text></svg>'
    )


def _reconstruction(inspection: ModelInspection) -> str:
    found = inspection.reconstruction
    if found is None:
        if inspection.unusable:
            return f"<p>Not done: {_text(inspection.unusable)}.</p>"
        return "<p>Pass <code>--backbone FOLDER_OR_HUB_ID</code> to see how much of each layer a backbone keeps.</p>"
    about = (
        f"Through {_text(found.backbone)}, {found.latent_size} numbers per token. R² is the share of the variance "
        "within tokens that is kept, each token in units of its own standard deviation; relative error is "
        "|reconstruction − weights| / |weights|. The random projection has as many numbers; "
    )
    about += _text(pca_about(inspection))
    return f"<p>{about}</p>{_r2_curves(inspection)}{_table(reconstruction_table(inspection))}"


def _r2_curves(inspection: ModelInspection) -> str:
    """R2 of every method over the depth of the model; below 0 it is drawn at 0."""
    found = inspection.reconstruction
    layers = list(found.layers.values())
    if len(layers) < 2:
        return ""
    width, height, left = 900, 180, 30
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = 10 + height * (1 - tick)
        parts.append(
            f'<path d="M{left} {y:.1f}H{width}" stroke="#e3e3e3"/><text x="0" y="{y + 3:.1f}">{tick:g}</text>'
        )
    for number_of, method in enumerate(method for method in METHODS if method in found.overall):
        color, dashes = METHOD_MARKS[method]
        points = [
            (left + (width - left) * index / (len(layers) - 1), 10 + height * (1 - max(0.0, layer[method].r2)))
            for index, layer in enumerate(layers)
            if layer[method].r2 is not None
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.6" stroke-dasharray="{dashes}"/>'
        )
        x = left + 170 * number_of
        parts.append(
            f'<path d="M{x} {height + 27}h24" stroke="{color}" stroke-width="2" stroke-dasharray="{dashes}"/>'
            f'<text x="{x + 30}" y="{height + 30}">R², {method}</text>'
        )
    return (
        f'<figure><svg viewBox="0 0 {width} {height + 36}" role="img" aria-label="R2 by layer">{"".join(parts)}</svg>'
        "<figcaption>From the first layer to the last. Below 0 a token's mean would have been the better guess; it is "
        "drawn at 0.</figcaption></figure>"
    )


def _neighbors(inspection: ModelInspection) -> str:
    found = inspection.neighbors
    if found is None and inspection.unusable:
        return f"<p>Not searched: {_text(inspection.unusable)}.</p>"
    if found is None:
        return "<p>Pass <code>--table FILE</code>, made by <code>hf-wsl embed</code>, to see them.</p>"
    return f"<p>{_text(neighbors_about(inspection))}</p>{_table(neighbors_table(inspection))}"
