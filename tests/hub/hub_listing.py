"""Listings of the tests' Hub: filters, order and pages."""

import base64
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from hub_facts import FULL_FIELDS, LIST_FIELDS, with_fields


SORTS = {
    "downloads": "downloads",
    "likes": "likes",
    "lastModified": "lastModified",
    "createdAt": "createdAt",
    "trendingScore": "trendingScore",
}
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "": 1.0}


def is_wanted(facts: dict[str, Any], query: dict[str, list[str]]) -> bool:
    """Whether a repository passes all filters of a query."""
    tags = set(facts["tags"])
    wanted = query.get("filter", []) + query.get("library", []) + query.get("apps", [])
    if not tags.issuperset(tag for text in wanted for tag in text.split(",")):
        return False
    if any(facts.get("pipeline_tag") != task for task in query.get("pipeline_tag", [])):
        return False
    if any(facts["author"] != author for author in query.get("author", [])):
        return False
    if any(text.lower() not in facts["id"].lower() for text in query.get("search", [])):
        return False
    if any(bool(facts.get("gated")) != (value.lower() == "true") for value in query.get("gated", [])):
        return False
    return all(is_between(facts.get("safetensors", {}).get("total"), text) for text in query.get("num_parameters", []))


def is_between(number: int | None, text: str) -> bool:
    """Whether a number is within "min:6B,max:128B"."""
    if number is None:
        return False
    for bound, value, unit in re.findall(r"(min|max):([\d.]+)([KMBT]?)", text):
        limit = float(value) * UNITS[unit]
        if number < limit if bound == "min" else number > limit:
            return False
    return True


def in_order(rows: list[tuple[int, dict[str, Any]]], sort: str | None) -> list[tuple[int, dict[str, Any]]]:
    """Rows (number of the repository, facts), the largest first, the oldest first among equals."""
    if sort is None:
        return sorted(rows, key=lambda row: row[0])
    rows = sorted(rows, key=lambda row: row[0])
    return sorted(rows, key=lambda row: row[1][SORTS[sort]], reverse=True)


def shown_fields(facts: dict[str, Any], query: dict[str, list[str]], flag: Callable[[str], bool]) -> dict[str, Any]:
    """The fields of a listed repository that a query asks for."""
    if query.get("expand"):
        return with_fields(facts, query["expand"])
    fields = [*(FULL_FIELDS if flag("full") else LIST_FIELDS)]
    return with_fields(facts, fields + [name for name in ("cardData", "config") if flag(name)])


def cut_page(
    items: list[Any], key: Callable[[Any], Any], cursor: str | None, size: int
) -> tuple[list[Any], str | None]:
    """The items after `cursor`, at most `size`, and the cursor for the rest.

    A cursor holds the keys of the items that were sent last, so a page stays right when one of them goes meanwhile.
    """
    start = 0
    if cursor:
        sent = json.loads(base64.urlsafe_b64decode(cursor))
        places = {json.dumps(key(item)): place for place, item in enumerate(items)}
        start = next((places[known] + 1 for known in reversed(sent) if known in places), 0)
    page = items[start : start + size]
    if start + size >= len(items):
        return page, None
    known = [json.dumps(key(item)) for item in page[-20:]]
    return page, base64.urlsafe_b64encode(json.dumps(known).encode()).decode()


def next_link(url: str, path: str, query: dict[str, list[str]], cursor: str | None) -> dict[str, str]:
    """The Link header that leads to the page after `cursor`; the client follows it as it is, so it is absolute."""
    if cursor is None:
        return {}
    rest = {name: values for name, values in query.items() if name != "cursor"} | {"cursor": [cursor]}
    return {"Link": f'<{url}{path}?{urlencode(rest, doseq=True)}>; rel="next"'}
