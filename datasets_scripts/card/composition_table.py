"""Which share of the models is of which family, and was trained on which data (paper, section 2 and Figure 1)."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_wsl.tables import markdown_table

from ..schema import ACCEPTED
from .composition import group_of
from .composition_rules import GROUPS, UNKNOWN


Row = Mapping[str, Any]


@dataclass(frozen=True)
class Share:
    """A part of the accepted models.

    Attributes:
        name: the family, or the training data.
        group: of a family, one of `GROUPS`; else "".
        models, parameters: in it.
        share: of all models.
    """

    name: str
    group: str
    models: int
    parameters: int
    share: float


def family_shares(rows: Sequence[Row]) -> list[Share]:
    """The families, in the order of their groups, the largest first.

    Args:
        rows: of the config `models`, without their manifests; refused ones do not count.
    """
    shares = _shares(rows, lambda row: (row["family"] or UNKNOWN, group_of(row)))
    return sorted(shares, key=lambda share: GROUPS.index(share.group))


def training_data_shares(rows: Sequence[Row]) -> list[Share]:
    """The training data, the largest first, unknown ones at the end; `rows` as in `family_shares`."""
    shares = _shares(rows, lambda row: (row["training_data"] or UNKNOWN, ""))
    return sorted(shares, key=lambda share: share.name == UNKNOWN)


def _shares(rows: Sequence[Row], part_of: Callable[[Row], tuple[str, str]]) -> list[Share]:
    parts: dict[Hashable, list[Row]] = {}
    for row in rows:
        if row["status"] == ACCEPTED:
            parts.setdefault(part_of(row), []).append(row)
    count = sum(map(len, parts.values()))
    shares = [
        Share(name, group, len(part), sum(row["num_parameters"] for row in part), len(part) / count)
        for (name, group), part in parts.items()
    ]
    return sorted(shares, key=lambda share: (-share.models, share.name))


def merge_rest(shares: Sequence[Share], limit: int) -> list[Share]:
    """At most `limit` parts: the smallest known ones become "<number> more" of no group."""
    if len(shares) <= limit:
        return list(shares)
    known = sorted((s for s in shares if s.name != UNKNOWN), key=lambda share: -share.models)
    rest = known[limit - 1 - (len(known) < len(shares)) :]
    merged = Share(
        f"{len(rest)} more",
        "",
        sum(s.models for s in rest),
        sum(s.parameters for s in rest),
        sum(s.share for s in rest),
    )
    kept = [share for share in shares if share not in rest]
    return [*(s for s in kept if s.name != UNKNOWN), merged, *(s for s in kept if s.name == UNKNOWN)]


def composition_table(rows: Sequence[Row], limit: int = 25) -> str:
    """Two tables in markdown: families by group, and training data; `rows` as in `family_shares`.

    Args:
        limit: of their lines; the smallest parts share one.
    """
    families = merge_rest(family_shares(rows), limit)
    data = merge_rest(training_data_shares(rows), limit)
    return "\n\n".join(
        [
            markdown_table(
                ("group", "family", "models", "share", "parameters"),
                [(s.group, s.name, f"{s.models:,}", f"{s.share:.1%}", f"{s.parameters:,}") for s in families],
                text_columns=2,
            ),
            markdown_table(
                ("trained on", "models", "share", "parameters"),
                [(s.name, f"{s.models:,}", f"{s.share:.1%}", f"{s.parameters:,}") for s in data],
            ),
        ]
    )
