"""The models of the Hub that a collection looks at, in their order, each pinned to the commit it was listed with."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from huggingface_hub import ModelInfo

from ..model_facts import hub_facts
from ..sources import ModelSource
from ..tokenize_config import TokenizeError
from .config import CollectConfig
from .hub_reader import HubReader


SORT_KEYS = {"downloads": "downloads", "likes": "likes", "last_modified": "lastModified", "created_at": "createdAt"}


@dataclass(frozen=True)
class Candidate:
    """A model as the Hub listed it.

    Attributes:
        repo_id: "owner/name".
        commit: the newest one at the time of the listing, or that of the revision that a list of models names.
        tags, card: as in `model_facts.HubFacts`; the card is its front matter.
        gated, disabled: flags of the Hub.
        stated: what a list of models says (`license`, `family`, ...).
    """

    repo_id: str
    commit: str
    tags: Sequence[str] = ()
    card: dict[str, Any] = field(default_factory=dict)
    gated: bool = False
    disabled: bool = False
    stated: dict[str, str] = field(default_factory=dict)

    @property
    def source(self) -> ModelSource:
        return ModelSource(self.repo_id, self.repo_id, self.repo_id, self.commit, self.stated)


@dataclass(frozen=True)
class Listing:
    """The candidates, and the queries that gave them.

    Attributes:
        candidates: each model once, in the order in which they are looked at.
        queries: task tag (or "all") -> models that the Hub listed for it.
        listed_on: ISO date.
        num_listed: distinct models of all queries, before `max_candidates`.
    """

    candidates: list[Candidate]
    queries: dict[str, int]
    listed_on: str
    num_listed: int


def list_candidates(config: CollectConfig, hub: HubReader) -> Listing:
    """Asks the Hub for all models of each task tag and puts them into one order.

    Raises:
        TokenizeError: the Hub lists nothing.
        RunError: it cannot be asked, after all retries.
    """
    listed, queries = {}, {}
    for task in config.task_tags or [None]:
        name = task or "all"
        infos = hub.list_models(
            name,
            filter=[tag for tag in (task, *config.tag_list, config.library) if tag] or None,
            author=config.author or None,
            search=config.search or None,
            sort=SORT_KEYS.get(config.order),
            limit=config.max_candidates if config.max_candidates and config.order != "random" else None,
            full=True,
            cardData=True,
        )
        queries[name] = len(infos)
        for info in infos:
            listed.setdefault(info.id, info)
    if not listed:
        raise TokenizeError(
            f"The Hub lists no model for {', '.join(queries)}"
            + "".join(f", {key}={getattr(config, key)!r}" for key in ("author", "library", "search", "tags"))
            + ". Ask for less, or correct the names."
        )
    ordered = _ordered(listed.values(), config)
    candidates = [_candidate(info) for info in ordered[: config.max_candidates or None] if info.sha]
    return Listing(candidates, queries, _today(), len(listed))


def named_candidates(models: Sequence[ModelSource], hub: HubReader) -> Listing:
    """Candidates from a list of models that the user gave, each pinned to the commit of its revision.

    Raises:
        TokenizeError: a source that is no Hub id.
        RefusedModel: one is not to be had at all; a mistyped id is told before any work is done.
    """
    candidates = []
    for model in models:
        if model.path is not None:
            raise TokenizeError(
                f"{model.label} is a local model. `collect` reads the Hub; use `hf-wsl tokenize` for files."
            )
        if (reference := model.reference).subfolder or reference.key is not None:
            raise TokenizeError(f"{reference}: collect takes whole repositories; tokenize takes a part of one")
        info = hub.info(model.location, model.revision)
        candidates.append(_candidate(info, dict(model.facts)))
    return Listing(candidates, {"named": len(candidates)}, _today(), len(candidates))


def _ordered(infos: Iterable[ModelInfo], config: CollectConfig) -> list[ModelInfo]:
    by_id = sorted(infos, key=lambda info: info.id)
    if config.order == "random":
        random.Random(config.seed).shuffle(by_id)
        return by_id

    def key(info: ModelInfo) -> float:
        value = getattr(info, config.order) or 0
        return value.timestamp() if isinstance(value, datetime) else value

    return sorted(by_id, key=key, reverse=True)  # a stable sort: equal ones stay in the order of their ids


def _candidate(info: ModelInfo, stated: dict[str, str] | None = None) -> Candidate:
    facts = hub_facts(info)
    return Candidate(
        info.id, info.sha, list(facts.tags), dict(facts.card), bool(info.gated), bool(info.disabled), stated or {}
    )


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
