"""Markdown from text that may hold anything: tables, plain words, code spans."""

import re
from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A table whose first `text_columns` columns are aligned left and the others, numbers, right."""
    align = ["---" if column < text_columns else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, align, *(map(_cell, row) for row in rows)])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def plus_minus(value: float, deviation: float | None, digits: int = 1) -> str:
    """`12.3 ± 0.4`, without the deviation where there is none."""
    return f"{value:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def plain(text: str) -> str:
    """Text of anybody's as words of markdown: no link, picture, code or tag begins in it."""
    return re.sub(r"([\\`\[\]])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")


def code(text: str) -> str:
    """Text of anybody's as a code span of markdown, which nothing in it can end."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"
