"""The dataset card, filled from what the run counted; nothing in it is typed by hand."""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import DatasetCardData

from .schema import ACCEPTED, MODELS, REFUSED, TRAIN, WINDOWS, card_configs
from .tokenize_config import TokenizeConfig


LISTED = 20  # rows of a table in the card; what is left out is counted
# Licences that the Hub has an identifier for and models are seen with; any other is "other", as the Hub wants it.
HUB_LICENCES = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "unlicense", "cc0-1.0"),
    *("cc-by-4.0", "cc-by-3.0", "cc-by-sa-4.0", "cc-by-sa-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    *(
        "gpl-2.0",
        "gpl-3.0",
        "lgpl-2.1",
        "lgpl-3.0",
        "agpl-3.0",
        "mpl-2.0",
        "epl-2.0",
        "artistic-2.0",
        "wtfpl",
        "ms-pl",
    ),
    *("openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "bigscience-bloom-rail-1.0"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma", "apple-amlr", "other", "unknown"),
}
SIZES = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]


@dataclass(frozen=True)
class CardFacts:
    """One model's share in the tables of the card: its row of the config `models` without the manifest."""

    row: Mapping[str, Any]
    split: str
    duplicate_group: str | None


def dataset_card(models: Sequence[CardFacts], config: TokenizeConfig) -> str:
    """README.md: front matter that `load_dataset` and the Hub read, and a description made of counts."""
    accepted = [m for m in models if m.row["status"] == ACCEPTED]
    splits = list(dict.fromkeys(m.split for m in sorted(models, key=_split_order)))
    windows = _sum(accepted, "num_windows")
    configs = {WINDOWS: [s for s in splits if s != REFUSED], MODELS: splits} if accepted else {MODELS: splits}
    data = DatasetCardData(
        license=sorted({_hub_licence(m.row["licence"]) for m in accepted}) or None,
        pretty_name=config.title,
        size_categories=next((name for limit, name in SIZES if windows < limit), "n>10M"),
        tags=["model-weights", "weight-space-learning", "hf-wsl"],
        configs=card_configs(configs, content_hash(models, config)),
    )
    sections = [
        f"# {config.title}",
        *(_contents(models, accepted, splits, config) if accepted else ["No model could be tokenized."]),
        *_refused([m for m in models if m.row["status"] == REFUSED]),
        _rebuilding(config),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _contents(
    models: Sequence[CardFacts], accepted: Sequence[CardFacts], splits: Sequence[str], config: TokenizeConfig
) -> list[str]:
    return [
        _summary(accepted, config),
        _table(("split", "models", "owners", "windows", "tokens", "parameters"), _split_rows(models, splits)),
        _reading(config),
        "## Models",
        _grouped("family", accepted),
        _grouped("licence", accepted),
        "Each model stays under its own licence, named with its source and revision in the config `models`.",
        _grouped("owner", accepted),
    ]


def content_hash(models: Sequence[CardFacts], config: TokenizeConfig) -> str:
    """Tells datasets apart: the settings, and every model's columns (the hash of its weights is one) and split."""
    digest = hashlib.sha256(json.dumps(config.settings(), sort_keys=True).encode())
    for model in models:
        digest.update(json.dumps([dict(model.row), model.split, model.duplicate_group], sort_keys=True).encode())
    return digest.hexdigest()


def _split_order(model: CardFacts) -> int:
    return 0 if model.split == TRAIN else 2 if model.split == REFUSED else 1


def _hub_licence(licence: str | None) -> str:
    if licence is None:
        return "unknown"
    return licence.lower() if licence.lower() in HUB_LICENCES else "other"


def _summary(accepted: Sequence[CardFacts], config: TokenizeConfig) -> str:
    parameters, tokens = _sum(accepted, "num_parameters"), _sum(accepted, "num_tokens")
    twins = len(accepted) - len({m.duplicate_group for m in accepted})
    held_out = "an owner" if config.split_by == "owner" else "a group of duplicates"
    return (
        f"The weights of {len(accepted):,} trained neural networks, {parameters:,} parameters in all, as {tokens:,} "
        f"tokens of {config.token_size} numbers ({config.tokenization} tokenization, {config.dtype}). "
        f"{1 - parameters / (tokens * config.token_size):.2%} of the numbers are padding. "
        f"{twins:,} models are bit-identical copies of others (`duplicate_group`); no split separates copies, nor the "
        f"models of {held_out}."
    )


def _split_rows(models: Sequence[CardFacts], splits: Sequence[str]) -> list[tuple[str, ...]]:
    rows = []
    for split in splits:
        here = [m for m in models if m.split == split]
        counts = (_sum(here, key) for key in ("num_windows", "num_tokens", "num_parameters"))
        owners = len({m.row["owner"] for m in here if m.row["owner"] is not None})
        rows.append((split, *(f"{n:,}" for n in (len(here), owners, *counts))))
    return rows


def _reading(config: TokenizeConfig) -> str:
    return f"""## Reading it

```python
from datasets import load_dataset

windows = load_dataset("<this dataset>", "windows", split="train")  # one row a window; streaming=True works too
models = load_dataset("<this dataset>", "models", split="train")  # one row a model: source, licence, manifest, ...
```

A row of `windows` holds at most {config.window_size} consecutive `tokens` of one model. The first `valid_entries[i]`
numbers of token i are weights, the others zero. The positions [index in the model, layer, index in the layer] follow
from the `segment_*` columns: the j-th token of a segment has the position
[`token_start` + index in the row, `segment_layer`, `segment_position` + j // `segment_stride`]. The manifest of a
model, in `models`, names every tensor, its shape and dtype, and its place among the tokens."""


def _grouped(column: str, accepted: Sequence[CardFacts]) -> str:
    """A table of models, tokens and parameters by the values of a column, the largest first."""
    groups: dict[str, list[CardFacts]] = {}
    for model in accepted:
        groups.setdefault(model.row[column] or "not stated", []).append(model)
    ranked = sorted(groups.items(), key=lambda item: (-_sum(item[1], "num_tokens"), item[0]))
    rows = [_group_row(name, group) for name, group in ranked[:LISTED]]
    if rest := [model for _, group in ranked[LISTED:] for model in group]:
        rows.append(_group_row(f"{len(ranked) - LISTED:,} more", rest))
    return _table((column, "models", "tokens", "parameters"), rows)


def _group_row(name: str, group: Sequence[CardFacts]) -> tuple[str, ...]:
    return name, *(f"{n:,}" for n in (len(group), _sum(group, "num_tokens"), _sum(group, "num_parameters")))


def _refused(refused: Sequence[CardFacts]) -> list[str]:
    if not refused:
        return []
    rows = [(m.row["model_id"], m.row["reason"]) for m in refused[:LISTED]]
    listed = f", of which {LISTED} are shown" if len(refused) > LISTED else ""
    text = (
        f"{len(refused):,} models were refused{listed}; all are in the split `refused` of `models`, with the reason."
    )
    return ["### Refused", text, _table(("model", "reason"), rows)]


def _rebuilding(config: TokenizeConfig) -> str:
    default = TokenizeConfig().settings()
    changed = {key: value for key, value in config.settings().items() if value != default[key]}
    options = [f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in changed.items()]
    command = " ".join(["hf-wsl tokenize PATH... --output DIR", *options])
    return f"""## How it was made

```
{command}
```

All settings, and a fingerprint of every source, are in `tokenize.json`; the feature extractor's are in
`preprocessor_config.json`, which `AutoFeatureExtractor.from_pretrained` reads."""


def _sum(models: Sequence[CardFacts], column: str) -> int:
    return sum(m.row[column] for m in models)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

    align = [
        "---" if name in ("model", "reason", "split", "family", "licence", "owner") else "---:" for name in header
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, align, *([cell(c) for c in row] for row in rows)])
