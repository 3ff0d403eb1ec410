"""The licenses under which weights may be passed on, in the Hub's spelling.

Rounded, or cut into tokens, weights are an adaptation of the model, so a license counts here if it lets others share
adapted copies, on whichever conditions: attribution, the same license, no commercial use. The sets say what the texts
of the licenses allow; they are no legal advice, and what they do not know is not allowed.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any


UNKNOWN, OTHER = "unknown", "other"  # as the Hub spells "none is stated" and "none of its list"

REDISTRIBUTABLE = frozenset(
    (
        # public domain, or as good as
        *("cc0-1.0", "pddl", "unlicense", "wtfpl"),
        # attribution
        *("mit", "isc", "zlib", "postgresql", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0"),
        *("ncsa", "apple-ascl", "afl-3.0", "ecl-2.0", "artistic-2.0", "lppl-1.3c", "apache-2.0", "openmdw-1.0"),
        *("cdla-permissive-1.0", "cdla-permissive-2.0", "odc-by", "etalab-2.0"),
        *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),
        # share alike
        *("mpl-2.0", "ms-pl", "epl-1.0", "epl-2.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "ofl-1.1"),
        *("cdla-sharing-1.0", "odbl", "cc-by-sa-3.0", "cc-by-sa-4.0", "gfdl", "osl-3.0", "eupl-1.1", "eupl-1.2"),
        *("gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0"),
        # forbidden uses, no commercial use
        *("openrail", "openrail++", "creativeml-openrail-m", "bigcode-openrail-m", "bigscience-openrail-m"),
        *("bigscience-bloom-rail-1.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0"),
        *("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    )
)
# Terms of their own, accepted from the owner one by one, or no adapted copies at all. Copies of such weights are
# theirs whatever license the copy states.
WITHHOLDING = frozenset(
    (
        *("gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "grok2-community", "c-uda"),
        *("apple-amlr", "intel-research", "h-research", "deepfloyd-if-license", "fair-noncommercial-research-license"),
        *("cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
    )
)
KNOWN = REDISTRIBUTABLE | WITHHOLDING | {"cc", OTHER, UNKNOWN}  # "cc" may be any of Creative Commons' licenses
# Spellings of cards, timm's configs and GitHub, after `_plain`; SPDX's "-only" and "-or-later" need no entry.
ALIASES = {
    "apache": "apache-2.0",
    "apache2": "apache-2.0",
    "mit-mit": "mit",
    "mit-0": "mit",
    "expat": "mit",
    "boost-1.0": "bsl-1.0",
    "boost-software-1.0": "bsl-1.0",
    "bsd-2": "bsd-2-clause",
    "bsd-2-clause-simplified": "bsd-2-clause",
    "simplified-bsd": "bsd-2-clause",
    "bsd-3": "bsd-3-clause",
    "bsd-3-clause-new-or-revised": "bsd-3-clause",
    "new-bsd": "bsd-3-clause",
    "cc0": "cc0-1.0",
    "cc-zero": "cc0-1.0",
    "cc-zero-1.0": "cc0-1.0",
    "cc-zero-1.0-universal": "cc0-1.0",
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
    "gemma-terms-of-use": "gemma",
    "apple-sample-code": "apple-ascl",
    "apple-machine-learning-research-model": "apple-amlr",
    "fair-nc-research": "fair-noncommercial-research-license",
    "deepfloyd-if": "deepfloyd-if-license",
    "deepfloyd-if-research": "deepfloyd-if-license",
    "none": UNKNOWN,
    "noassertion": UNKNOWN,
    "n-a": UNKNOWN,
    "": UNKNOWN,  # "License" too: nothing is left of it
}
_FILLER = re.compile(r"\b(the|licen[cs]e|agreement|version|v|attribution|gnu|meta|community)(?=\b|\d)")
_WORDS = (  # long names to the Hub's abbreviations
    ("creative-commons", "cc"),
    ("non-commercial", "nc"),
    ("noncommercial", "nc"),
    ("share-alike", "sa"),
    ("sharealike", "sa"),
    ("no-derivatives", "nd"),
    ("noderivatives", "nd"),
    ("noderivs", "nd"),
    ("affero-general-public", "agpl"),
    ("lesser-general-public", "lgpl"),
    ("general-public", "gpl"),
    ("llama-", "llama"),
)


def is_redistributable(license: str | None) -> bool:
    """Whether a license, in any usual spelling, lets others redistribute a model's weights rounded or as tokens.

    None and "" (no license is stated) and licenses that are not known here do not; of several, separated by commas,
    all have to, for a card does not say which file each is for.
    """
    return REDISTRIBUTABLE.issuperset(license_ids(license))


def license_ids(license: str | None) -> tuple[str, ...]:
    """The Hub's identifiers of the licenses that a card, a timm config or a repository means.

    Args:
        license: any usual spelling, "Apache License 2.0", "apache-2.0", "Apache-2.0"; several separated by commas;
            None or "" where nothing is said.

    Returns:
        one identifier for each, without repetitions: "unknown" for one that is not stated, "other" for one that is
        not known here.
    """
    text = " ".join((license or "").split())
    if single := _identifier(text):
        return (single,)
    return tuple(dict.fromkeys(_identifier(part) or OTHER for part in text.split(",")))


def refusal_reason(license: str | None) -> str:
    """The reason why weights under a license that is not redistributable stay behind, for people to read."""
    identifiers = license_ids(license)
    if identifiers == (UNKNOWN,):
        return "no license is stated, so nothing is allowed"
    if WITHHOLDING.intersection(identifiers):
        return f"license {license} does not let others share adapted copies, and rounded weights are one"
    return f"license {license} is not among those that are known here to let others share adapted copies"


def withheld_models(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The models whose weights must not be passed on: model_id -> reason.

    A license that withholds them counts for bit-identical copies too, whatever license those state. One that is
    merely unknown does not.

    Args:
        rows: of the config `models` with `model_id`, `license` and `weights_sha256`, of accepted models only.
    """
    rows = list(rows)
    originals: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if WITHHOLDING.intersection(license_ids(row["license"])):
            originals.setdefault(row["weights_sha256"], row)
    withheld = {}
    for row in rows:
        original = originals.get(row["weights_sha256"])
        if not is_redistributable(row["license"]):
            withheld[row["model_id"]] = refusal_reason(row["license"])
        elif original is not None:
            reason = refusal_reason(original["license"])
            withheld[row["model_id"]] = f"has the weights of {original['model_id']}, bit for bit, whose {reason}"
    return withheld


def _identifier(text: str) -> str | None:
    """The Hub's identifier of one license; None for one that is not known here."""
    key = text.lower().strip()
    if key in KNOWN:
        return key
    key = _plain(key)
    key = ALIASES.get(key, key)
    return next((name for name in (key, f"{key}.0") if name in KNOWN), None)


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
