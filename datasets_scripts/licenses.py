"""What the licenses of models allow: one table, in the Hub's spelling, and what follows from it for sharing weights.

Stored rounded or cut into tokens, weights are an adaptation of the model, so what counts is whether a license lets
others share adapted copies. The table says what the texts of the licenses ask for; it is no legal advice, and where it
knows nothing the answer is no.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass


UNKNOWN, OTHER = "unknown", "other"  # as the Hub spells "none is stated" and "none of its list"

# What each asks of who shares an adapted copy, from the freest to the strictest: this order is the rank.
#   by   name the author, pass on the license's text        nc   no commercial use
#   sa   share it under the same license                    own  terms of its own, accepted one by one, often gated
#   use  pass on a list of uses that are forbidden          nd   no adapted copies at all
TABLE = {
    # public domain, or as good as
    **dict.fromkeys(("cc0-1.0", "pddl", "unlicense", "wtfpl"), ""),
    # attribution
    **dict.fromkeys(("mit", "isc", "zlib", "postgresql", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear"), "by"),
    **dict.fromkeys(("bsd", "bsl-1.0", "ncsa", "apple-ascl", "afl-3.0", "ecl-2.0", "artistic-2.0", "lppl-1.3c"), "by"),
    **dict.fromkeys(("apache-2.0", "openmdw-1.0", "cdla-permissive-2.0", "cdla-permissive-1.0", "odc-by"), "by"),
    **dict.fromkeys(("etalab-2.0", "cc-by-4.0", "cc-by-3.0", "cc-by-2.5", "cc-by-2.0"), "by"),
    # share alike: of the licensed files, then of the whole work
    **dict.fromkeys(("mpl-2.0", "ms-pl", "epl-2.0", "epl-1.0", "lgpl-2.1", "lgpl", "lgpl-3.0", "lgpl-lr"), "by sa"),
    **dict.fromkeys(("ofl-1.1", "cdla-sharing-1.0", "odbl", "cc-by-sa-3.0", "cc-by-sa-4.0", "gfdl"), "by sa"),
    **dict.fromkeys(("osl-3.0", "eupl-1.1", "eupl-1.2", "gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0"), "by sa"),
    # use restrictions
    **dict.fromkeys(("openrail", "openrail++", "creativeml-openrail-m", "bigcode-openrail-m"), "by use"),
    **dict.fromkeys(("bigscience-openrail-m", "bigscience-bloom-rail-1.0"), "by use"),
    # no commercial use
    **dict.fromkeys(("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0"), "by nc"),
    **dict.fromkeys(("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"), "by nc sa"),
    # terms of their own
    **dict.fromkeys(("gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"), "by use own"),
    **dict.fromkeys(("grok2-community", "c-uda"), "by use own"),
    **dict.fromkeys(("apple-amlr", "intel-research", "h-research", "deepfloyd-if-license"), "by nc own"),
    **dict.fromkeys(("fair-noncommercial-research-license",), "by nc own"),
    # no adapted copies
    **dict.fromkeys(("cc-by-nd-4.0",), "by nd"),
    **dict.fromkeys(("cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"), "by nc nd"),
    # nothing to go by: "cc" may be any of them
    **dict.fromkeys(("cc", OTHER, UNKNOWN), "?"),
}
# Spellings of cards, timm's configs and GitHub, after `_plain`; SPDX's "-only" and "-or-later" need no entry.
ALIASES = {
    "apache": "apache-2.0",
    "apache-2": "apache-2.0",
    "apache2": "apache-2.0",
    "mit-mit": "mit",
    "mit-0": "mit",
    "expat": "mit",
    "boost-1.0": "bsl-1.0",
    "boost-software-1.0": "bsl-1.0",
    "bsd-2-clause-simplified": "bsd-2-clause",
    "simplified-bsd": "bsd-2-clause",
    "bsd-3-clause-new-or-revised": "bsd-3-clause",
    "new-bsd": "bsd-3-clause",
    "bsd-3": "bsd-3-clause",
    "bsd-2": "bsd-2-clause",
    "cc0": "cc0-1.0",
    "cc-zero": "cc0-1.0",
    "cc-zero-1.0": "cc0-1.0",
    "cc-zero-1.0-universal": "cc0-1.0",
    "gnu-gpl-2.0": "gpl-2.0",
    "gnu-gpl-3.0": "gpl-3.0",
    "gnu-lgpl-2.1": "lgpl-2.1",
    "gnu-lgpl-3.0": "lgpl-3.0",
    "gnu-agpl-3.0": "agpl-3.0",
    "gpl-2": "gpl-2.0",
    "gpl-3": "gpl-3.0",
    "lgpl-3": "lgpl-3.0",
    "agpl-3": "agpl-3.0",
    "gplv2": "gpl-2.0",
    "gplv3": "gpl-3.0",
    "lgplv3": "lgpl-3.0",
    "agplv3": "agpl-3.0",
    "mozilla-public-2.0": "mpl-2.0",
    "mpl2": "mpl-2.0",
    "eclipse-public-2.0": "epl-2.0",
    "academic-free-3.0": "afl-3.0",
    "odbl-1.0": "odbl",
    "odc-by-1.0": "odc-by",
    "pddl-1.0": "pddl",
    "creativeml-open-rail-m": "creativeml-openrail-m",
    "openrail-m": "openrail",
    "openrail++-m": "openrail++",
    "bigscience-rail-1.0": "bigscience-bloom-rail-1.0",
    "llama-2": "llama2",
    "llama-2-community": "llama2",
    "llama2-community": "llama2",
    "meta-llama-3-community": "llama3",
    "llama-3": "llama3",
    "llama-3-community": "llama3",
    "llama3-community": "llama3",
    "llama-3.1": "llama3.1",
    "llama-3.1-community": "llama3.1",
    "llama-3.2": "llama3.2",
    "llama-3.2-community": "llama3.2",
    "llama-3.3": "llama3.3",
    "llama-3.3-community": "llama3.3",
    "llama-4": "llama4",
    "llama-4-community": "llama4",
    "gemma-terms-of-use": "gemma",
    "apple-sample-code": "apple-ascl",
    "apple-machine-learning-research-model": "apple-amlr",
    "fair-nc-research": "fair-noncommercial-research-license",
    "deepfloyd-if-research": "deepfloyd-if-license",
    "deepfloyd-if": "deepfloyd-if-license",
    "none": UNKNOWN,
    "noassertion": UNKNOWN,
    "n-a": UNKNOWN,
    "": UNKNOWN,  # "License" too: nothing is left of it
}
# A work may pass from the first license to the second, as their texts or their stewards say; else each wants its own.
MAY_BECOME = {
    ("cc-by-sa-3.0", "cc-by-sa-4.0"),
    ("cc-by-sa-4.0", "gpl-3.0"),
    ("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0"),
    ("cc-by-nc-sa-2.0", "cc-by-nc-sa-4.0"),
    ("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    ("mpl-2.0", "gpl-2.0"),
    ("mpl-2.0", "gpl-3.0"),
    ("mpl-2.0", "lgpl-2.1"),
    ("mpl-2.0", "lgpl-3.0"),
    ("mpl-2.0", "agpl-3.0"),
    ("lgpl-2.1", "gpl-2.0"),
    ("lgpl-2.1", "gpl-3.0"),
    ("lgpl-3.0", "gpl-3.0"),
    ("lgpl-3.0", "agpl-3.0"),
    ("gpl-3.0", "agpl-3.0"),
}
REASONS = {  # of a refusal; the strictest word decides
    "nd": "forbids sharing adapted copies, and rounded weights are one",
    "own": "has terms of its own that everyone has to accept from its owner",
    "?": "is not among those whose terms are known here",
}


@dataclass(frozen=True)
class License:
    """One row of the table.

    Attributes:
        identifier: as the Hub spells it in a card; "other" and "unknown" are identifiers too.
        stated: the words that it was found under; the identifier itself where it is meant.
        terms: words of the table.
    """

    identifier: str
    stated: str
    terms: frozenset[str]

    @property
    def rank(self) -> int:
        """Place in the table: the larger, the stricter."""
        return _RANK[self.identifier]

    @property
    def attribution(self) -> bool:
        return "by" in self.terms

    @property
    def share_alike(self) -> bool:
        return "sa" in self.terms

    @property
    def use_restrictions(self) -> bool:
        return "use" in self.terms

    @property
    def non_commercial(self) -> bool:
        return "nc" in self.terms

    @property
    def redistribution(self) -> "Redistribution":
        """Whether adapted copies of the weights may be shared under it."""
        if self.identifier == UNKNOWN:
            return Redistribution(False, "no license is stated, so nothing is allowed")
        for word, reason in REASONS.items():
            if word in self.terms:
                return Redistribution(False, f"license {self.stated} {reason}")
        asked = {
            "by": "with attribution",
            "sa": "under the same license",
            "use": "with its use restrictions",
            "nc": "not commercially",
        }
        conditions = [words for word, words in asked.items() if word in self.terms] or ["without conditions"]
        return Redistribution(True, f"license {self.stated} allows it {', '.join(conditions)}")


@dataclass(frozen=True)
class Redistribution:
    """Yes or no (its truth value), and why."""

    allowed: bool
    reason: str

    def __bool__(self) -> bool:
        return self.allowed


@dataclass(frozen=True)
class Strictest:
    """The license of something made of several.

    Attributes:
        license: the last in the table of those given.
        conflicts: a sentence for each pair that no license of the whole can satisfy; empty where there is none.
    """

    license: License
    conflicts: tuple[str, ...]


_RANK = {identifier: rank for rank, identifier in enumerate(TABLE)}
_FILLER = re.compile(r"\b(the|licen[cs]e|agreement|version|v|attribution)(?=\b|\d)")
_WORDS = (  # long names to the Hub's abbreviations
    ("creative-commons", "cc"),
    ("non-commercial", "nc"),
    ("noncommercial", "nc"),
    ("share-alike", "sa"),
    ("sharealike", "sa"),
    ("no-derivatives", "nd"),
    ("noderivatives", "nd"),
    ("noderivs", "nd"),
    ("gnu-affero-general-public", "gnu-agpl"),
    ("gnu-lesser-general-public", "gnu-lgpl"),
    ("gnu-general-public", "gnu-gpl"),
)


def license_of(text: str | None) -> License:
    """Finds the license that a card, a timm config or a repository means.

    Args:
        text: any usual spelling, "Apache License 2.0", "apache-2.0", "Apache-2.0"; of several, separated by commas,
            the strictest counts, for a card does not say which file each is for; None or "" where nothing is said.

    Returns:
        its row. "other" stands for a license that the table lacks, with its name in `stated`.
    """
    text = " ".join((text or "").split())
    whole = _identifier(text)
    if whole is None and "," in text:
        parts = [_identifier(part) for part in text.split(",")]
        whole = None if None in parts else max(parts, key=_RANK.__getitem__)
    if whole is None:
        return License(OTHER, text, frozenset(TABLE[OTHER].split()))
    return License(whole, whole, frozenset(TABLE[whole].split()))


def redistributable(text: str | None) -> Redistribution:
    """Whether weights under this license may be shared rounded or cut into tokens; true or false, with the reason."""
    return license_of(text).redistribution


def is_redistributable(license: str | None) -> bool:
    """Whether a license, in any usual spelling, lets others redistribute a model's weights rounded or as tokens.

    None and "" (no license is stated) and licenses that are not known here do not.
    """
    return bool(redistributable(license))


def strictest(licenses: Iterable[str | License | None]) -> Strictest:
    """The license for what is made of several parts: the strictest by the table's order, and the conflicts among them.

    A conflict is a pair of licenses of which one wants the whole under itself (share alike) and the other adds a
    restriction, or wants the same for itself: GPL with a non-commercial one, for example. No choice of license mends
    that; only the owners can.

    Raises:
        ValueError: no license given.
    """
    found = {license.stated: license for license in (_as_license(each) for each in licenses)}
    if not found:
        raise ValueError("No licenses were given, so there is no strictest one.")
    ranked = sorted(found.values(), key=lambda license: (license.rank, license.stated))
    pairs = [(first, second) for n, first in enumerate(ranked) for second in ranked[n + 1 :]]
    return Strictest(ranked[-1], tuple(filter(None, (_conflict(*pair) for pair in pairs))))


def _as_license(license: str | License | None) -> License:
    return license if isinstance(license, License) else license_of(license)


def _conflict(milder: License, stricter: License) -> str | None:
    if milder.identifier == stricter.identifier or (milder.identifier, stricter.identifier) in MAY_BECOME:
        return None
    if "?" in milder.terms | stricter.terms:
        return None  # nothing is known to conflict with
    if milder.share_alike and stricter.share_alike:
        return f"{milder.stated} and {stricter.stated} each want the whole under themselves"
    names = {"nc": "no commercial use", "use": "forbidden uses", "own": "terms of its own", "nd": "no adapted copies"}
    for one, other in ((milder, stricter), (stricter, milder)):
        added = [names[word] for word in names if word in other.terms - one.terms]
        if one.share_alike and added:
            return f"{one.stated} forbids further restrictions, and {other.stated} adds some ({', '.join(added)})"
    return None


def _identifier(text: str) -> str | None:
    """The Hub's identifier of one license; None for one that the table lacks."""
    key = text.lower().strip()
    found = key if key in TABLE else _plain(key)
    found = ALIASES.get(found, found)
    return found if found in TABLE else None


def _plain(text: str) -> str:
    """Lower case, hyphens for blanks, without words that say nothing: "Apache License, v2.0" -> "apache-2.0"."""
    text = re.sub(r"[^a-z0-9.+]+", "-", text)
    for long, short in _WORDS:
        text = text.replace(long, short)
    if text.startswith("cc-") and not text.startswith(("cc-by", "cc-zero")):
        text = text.replace("cc-", "cc-by-", 1)
    text = _FILLER.sub("", text)
    text = re.sub(r"-(only|or-later|international|unported|generic)$", "", re.sub(r"-{2,}", "-", text).strip("-"))
    return re.sub(r"-{2,}", "-", text).strip("-+")
