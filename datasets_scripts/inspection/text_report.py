"""An inspection as text for the terminal."""

from .model_inspection import ModelInspection
from .report_rows import (
    Table,
    carried_table,
    findings_table,
    identity,
    layers_table,
    neighbors_about,
    neighbors_table,
    pca_about,
    printable,
    reconstruction_table,
)


MAX_CELL = 72  # characters of a cell of text in the terminal


def text_report(inspection: ModelInspection) -> str:
    """Identity, layers, what is carried, reconstruction and neighbors where asked for, and what is odd at the end."""
    width = max(len(label) for label, _ in identity(inspection))
    lines = [f"{label:<{width}}  {printable(value)}" for label, value in identity(inspection)]
    sections = [("Layers", layers_table(inspection), "No tensor is tokenized.")]
    if inspection.carried:
        sections.append(("Carried, not tokenized", carried_table(inspection), ""))
    for title, table, without in sections:
        lines += ["", title, *(_aligned(table) if table.rows else [without])]
    lines += ["", "Reconstruction", *_reconstruction(inspection)]
    lines += ["", "Nearest models", *_neighbors(inspection)]
    lines += ["", "Findings"]
    for severity, what, names in findings_table(inspection).rows:
        lines.append(f"{severity}: {printable(what)}: {printable(names)}")
    if not inspection.findings:
        lines.append("Nothing odd.")
    return "\n".join(lines)


def _reconstruction(inspection: ModelInspection) -> list[str]:
    found = inspection.reconstruction
    if found is None:
        why = inspection.unusable
        return [f"Not done: {printable(why)}." if why else "Pass --backbone FOLDER_OR_HUB_ID to see it."]
    about = f"{printable(found.backbone)}, {found.latent_size} numbers per token; so has the random projection. "
    return [about + pca_about(inspection), *_aligned(reconstruction_table(inspection))]


def _neighbors(inspection: ModelInspection) -> list[str]:
    found = inspection.neighbors
    if found is None and inspection.unusable:
        return [f"Not searched: {printable(inspection.unusable)}."]
    if found is None:
        return ["Pass --table FILE, made by `hf-wsl embed`, to see them."]
    return [printable(neighbors_about(inspection)), *_aligned(neighbors_table(inspection))]


def _aligned(table: Table) -> list[str]:
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
    text = printable(text)
    return text if len(text) <= MAX_CELL else "…" + text[1 - MAX_CELL :]
