"""An inspection as one self-contained HTML page; see `hf_wsl.pages`."""

import math
from os import PathLike
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hf_wsl.files import write_text
from hf_wsl.pages import BLUE, GREEN, RED, html_page, inline_svg, new_figure

from . import report
from .findings import MAX_Z, MIN_FACTOR, MIN_TENSORS_OF_KIND
from .model_inspection import ModelInspection
from .tensor_statistics import CENTRAL_STDS, MAX_SPECTRUM_ENTRIES, Histogram


TEMPLATE = Path(__file__).parent / "inspection.html"
MIN_DRAWN_ENTRIES = 64  # of fewer a histogram shows nothing
HEAVY_TAILS = 6.0  # kurtosis from which counts are drawn on a logarithmic scale
# Color is never the only difference.
STYLES = {
    "backbone": {"color": RED, "linestyle": "-"},
    "pca": {"color": GREEN, "linestyle": "--"},
    "random projection": {"color": BLUE, "linestyle": ":"},
}


def write_page(inspection: ModelInspection, path: str | PathLike) -> None:
    """Writes the page; see `hf_wsl.files.replacing`."""
    write_text(Path(path), inspection_page(inspection))


def inspection_page(inspection: ModelInspection) -> str:
    """The page as text."""
    return html_page(
        TEMPLATE,
        title=report.printable(inspection.model_id),
        inspection=inspection,
        identity=report.identity(inspection),
        findings=report.findings(inspection),
        histograms=_histograms(inspection),
        layers=report.layers(inspection),
        carried=report.carried(inspection),
        reconstruction=report.reconstruction(inspection),
        r2_curves=_r2_curves(inspection),
        neighbors=report.neighbors(inspection),
        max_z=MAX_Z,
        min_factor=MIN_FACTOR,
        min_tensors=MIN_TENSORS_OF_KIND,
        central=CENTRAL_STDS,
        heavy=HEAVY_TAILS,
        min_drawn=MIN_DRAWN_ENTRIES,
        max_spectrum=MAX_SPECTRUM_ENTRIES,
    )


def _histograms(inspection: ModelInspection) -> list[dict[str, Any]]:
    """Picture, ends of the range and caption of the largest tensor of each layer that is worth a picture."""
    shown = []
    for tensor in (layer.main_tensor for layer in inspection.layers):
        histogram = tensor.statistics.histogram
        if histogram is None or tensor.entries < MIN_DRAWN_ENTRIES:
            continue
        caption = f"{tensor.kind}, {report.shape_of(tensor.shape)}"
        if histogram.outside:
            caption += f"; {histogram.outside:,} farther out"
        shown.append(
            {
                "name": report.printable(tensor.name),
                "caption": caption,
                "low": report.number(histogram.low),
                "high": report.number(histogram.high),
                "picture": _bars(histogram, logarithmic=(tensor.statistics.kurtosis or 0) > HEAVY_TAILS),
            }
        )
    return shown


def _bars(histogram: Histogram, logarithmic: bool) -> str:
    """One shape on a line, without axes: the page says what the ends are."""
    heights = [math.log1p(count) if logarithmic else count for count in histogram.counts]
    figure = Figure(figsize=(2.6, 0.8))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, len(heights)), ylim=(0, 1.04 * max(heights)))
    axes.stairs(heights, fill=True, color=RED if logarithmic else BLUE, alpha=0.75, clip_on=False)
    axes.axhline(0, color="#555555", linewidth=1.2, clip_on=False)
    axes.set_axis_off()
    figure.patch.set_visible(False)
    return inline_svg(figure, "histogram")


def _r2_curves(inspection: ModelInspection) -> str | None:
    """R2 of each method over the depth of the model; below 0 it is drawn at 0. None for fewer than two layers."""
    result = inspection.reconstruction
    if result is None or len(result.layers) < 2:
        return None
    layers = list(result.layers.values())
    figure, axes = new_figure(9, 2.6)
    for method in (method for method in report.METHODS if method in result.overall):
        points = [(x, max(0.0, layer[method].r2)) for x, layer in enumerate(layers) if layer[method].r2 is not None]
        marker = "." if len(points) < 60 else ""
        axes.plot(*zip(*points, strict=True), label=method, linewidth=1.6, marker=marker, **STYLES[method])
    axes.set(ylim=(-0.02, 1.02), xlim=(-0.2, len(layers) - 0.8), ylabel="R²", xticks=[])
    figure.legend(loc="outside lower center", ncols=len(STYLES), frameon=False)
    return inline_svg(figure, "R2 by layer")
