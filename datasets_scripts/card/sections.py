"""The sections of the dataset card: each is made of the rows of the config `models`, and nothing else."""

import shlex
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_wsl.tables import markdown_table, plain

from ..licenses import is_redistributable
from ..outcomes import OUTCOMES
from ..schema import EXTRACTOR_FILE, REFUSED, REPORT_FILE, WINDOWS
from ..tokenize_config import DatasetConfig
from .composition import composition_table


LISTED = 20  # rows of a table; what is left out is counted
REASON_LENGTH = 200
NOT_STATED = "not stated"
HUB = "https://huggingface.co"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Collection:
    """The search of the Hub that a dataset's models come from.

    Attributes:
        command: the program and what it was given beside options: `("hf-wsl", "collect")`, and models if some were
            named. The card adds the options.
        endpoint: of the Hub.
        listed_on: ISO date of the listing.
        queries: task tag -> models that the Hub listed for it.
        num_listed: distinct models of all queries.
        num_examined: those of them that were looked at until there were enough.
    """

    command: Sequence[str]
    endpoint: str
    listed_on: str
    queries: Mapping[str, int]
    num_listed: int
    num_examined: int


def summary(
    accepted: Sequence[Row], config: DatasetConfig, collected: Collection | None, properties: bool = False
) -> str:
    parameters, tokens = _sum(accepted, "num_parameters"), _sum(accepted, "num_tokens")
    together = "Duplicates and near copies are always in one split."
    if properties:
        together = "All checkpoints of a member of the zoo are in one split; near copies may be in several."
    elif config.split_by == "owner":
        together = "Duplicates, near copies and the models of an owner are always in one split."
    origin = ""
    if collected is not None:
        origin = (
            f"They were collected from the Hub as listed on {collected.listed_on}, after section 2 of [Learning Model "
            "Representations Using Publicly Available Model Hubs](https://arxiv.org/abs/2510.02096). "
        )
    return (
        f"The weights of {len(accepted):,} trained neural networks, {parameters:,} parameters in all, as {tokens:,} "
        f"tokens of {config.token_size} numbers ({config.tokenization} tokenization, {config.dtype}). "
        f"{1 - parameters / (tokens * config.token_size):.2%} of the numbers are padding. {origin}"
        f"{together}"
    )


def split_table(rows: Sequence[Row], splits: Sequence[str]) -> str:
    return markdown_table(
        ("split", "models", "owners", "windows", "tokens", "parameters"),
        [_split_row(split, [row for row in rows if row["split"] == split]) for split in splits],
    )


def _split_row(split: str, rows: Sequence[Row]) -> tuple[str, ...]:
    owners = len({row["owner"] for row in rows if row["owner"] is not None})
    sums = (_sum(rows, key) for key in ("num_windows", "num_tokens", "num_parameters"))
    return split, *(f"{n:,}" for n in (len(rows), owners, *sums))


def reading(config: DatasetConfig, dataset_id: str, properties: bool = False) -> str:
    listed = (
        "\n# one row a model, in the order of models: settings, epoch, accuracies, ...\n"
        f'properties = load_dataset("{dataset_id}", "properties", split="train")'
        if properties
        else ""
    )
    normalized = (
        " The weights of each layer are stored less the layer's mean over the training models, in its standard "
        "deviations; both are in that file."
        if config.layer_normalization
        else ""
    )
    return f"""## Reading it

```python
from datasets import load_dataset

# one row a window; streaming=True works too
windows = load_dataset("{dataset_id}", "windows", split="train")
# one row a model: source, license, family, manifest, ...
models = load_dataset("{dataset_id}", "models", split="train"){listed}
```

A row of `windows` holds at most {config.window_size} consecutive `tokens` of one model. The first `valid_entries[i]`
numbers of token i are weights, the others zero. The positions [index in the model, layer, index in the layer] follow
from the `segment_*` columns: the j-th token of a segment has the position
[`token_start` + index in the row, `segment_layer`, `segment_position` + j // `segment_stride`]. The manifest of a
model, in `models`, names every tensor, its shape and dtype, and its place among the tokens. `AutoFeatureExtractor`
reads `{EXTRACTOR_FILE}` and turns other models into such tokens, and tokens into weights.{normalized}"""


def subsets(accepted: Sequence[Row], families: Mapping[str, Sequence[str]], dataset_id: str) -> Iterator[str]:
    """The configs of the families (paper, Table 2)."""
    if not families:
        return
    yield "## Subsets by family"
    yield (
        f'The windows of each family are a config of their own, `load_dataset("{dataset_id}", '
        f'"{WINDOWS}-{next(iter(families))}")`. Families that have none belong to `{WINDOWS}-other`.'
    )
    parts: dict[str, list[Row]] = {family: [] for family in families}
    for row in accepted:
        parts[row["family"] if row["family"] in parts else "other"].append(row)
    rows = []
    for family, splits in families.items():
        in_splits = ", ".join(f"{split} {sum(r['split'] == split for r in parts[family]):,}" for split in splits)
        sums = (_sum(parts[family], key) for key in ("num_windows", "num_tokens", "num_parameters"))
        rows.append((f"{WINDOWS}-{family}", in_splits, *(f"{n:,}" for n in sums)))
    yield markdown_table(("config", "models", "windows", "tokens", "parameters"), rows, text_columns=2)


def composition(accepted: Sequence[Row], picture: str | None, collected: Collection | None) -> Iterator[str]:
    yield "## Composition"
    if picture is not None:
        yield f"![Share of the models by architecture family, and by what they were trained on]({picture})"
    text = (
        "Families follow from the architecture that a model's config states, training data from its card and tags. "
        "What these do not tell is unknown."
    )
    if collected is not None:
        text += (
            " The paper's collection has 42.0% Transformers, 21.8% ConvNets, 5% hybrids and 31.4% unknown (Figure 1)."
        )
    yield text
    yield composition_table(accepted)


def licenses(accepted: Sequence[Row]) -> Iterator[str]:
    yield "## Licenses"
    yield "Each model stays under its own license, named with its source and revision in the config `models`."
    allowed = {
        plain(row["license"] or NOT_STATED): "yes" if is_redistributable(row["license"]) else "no" for row in accepted
    }
    lines = [(*line, allowed.get(line[0], "")) for line in _grouped(accepted, "license")]
    yield markdown_table(("license", "models", "tokens", "parameters", "adapted copies may be shared"), lines)


def withheld_section(withheld: Sequence[Row], reasons: Mapping[str, str]) -> Iterator[str]:
    """The models whose windows are not in this copy, and why; `reasons` by `model_id`."""
    if not withheld:
        return
    yield "## Withheld"
    listed = f", of which {LISTED} are shown" if len(withheld) > LISTED else ""
    yield (
        f"The windows of {_count(len(withheld), 'model')} with {_sum(withheld, 'num_parameters'):,} parameters are "
        f"not in this copy{listed}. Their licenses do not let others share them (`redistributable` is false in "
        "`models`, which lists them); rebuilding the dataset brings them back."
    )
    lines = [(plain(row["model_id"]), plain(reasons[row["model_id"]])) for row in withheld[:LISTED]]
    yield markdown_table(("model", "reason"), lines, text_columns=2)


def owners(accepted: Sequence[Row]) -> Iterator[str]:
    yield "## Owners"
    yield markdown_table(("owner", "models", "tokens", "parameters"), _grouped(accepted, "owner"))


def copies(accepted: Sequence[Row]) -> Iterator[str]:
    """Exact and near copies, and the largest groups of the latter."""
    yield "## Duplicates and near copies"
    exact = len(accepted) - len({row["duplicate_group"] for row in accepted})
    groups = Counter(row["near_copy_group"] for row in accepted)
    large = [(name, size) for name, size in groups.most_common() if size > 1]
    are_copies = "is a bit-identical copy" if exact == 1 else "are bit-identical copies"
    in_groups = f"{sum(size for _, size in large):,} models are in {_count(len(large), 'group')}"
    yield (
        f"{_count(exact, 'model')} {are_copies} of others (`duplicate_group`). {in_groups} of near copies "
        "(`near_copy_group`): fine-tunes of one base as they state it, and models whose weights point "
        "the same way. Copies with permuted neurons are not found. Groups are named after their first model."
    )
    if large:
        yield markdown_table(("near copies of", "models"), [(plain(n), f"{size:,}") for n, size in _head(large)])


def outcomes(rows: Sequence[Row]) -> Iterator[str]:
    """The outcomes of all models that were looked at, with examples."""
    refused = [row for row in rows if row["split"] == REFUSED]
    if not refused:
        return
    yield "## Outcomes"
    counts = Counter(row["outcome"] for row in rows)
    known = [outcome for outcome in OUTCOMES if counts[outcome]]
    yield markdown_table(
        ("outcome", "meaning", "models"),
        [(outcome, OUTCOMES[outcome], f"{counts[outcome]:,}") for outcome in known],
        text_columns=2,
    )
    examples = _examples(refused)
    listed = f", of which {len(examples)} are shown" if len(refused) > len(examples) else ""
    yield f"{len(refused):,} models were refused{listed}; all are in the split `refused` of `models`, with the reason."
    lines = [
        (
            plain(row["model_id"]),
            row["outcome"],
            plain(textwrap.shorten(row["reason"], REASON_LENGTH, placeholder=" ...")),
        )
        for row in examples
    ]
    yield markdown_table(("model", "outcome", "reason"), lines, text_columns=3)


def _examples(refused: Sequence[Row]) -> list[Row]:
    """At most `LISTED` models, of every outcome about as many."""
    if len(refused) <= LISTED:
        return list(refused)
    by_outcome = [[row for row in refused if row["outcome"] == outcome] for outcome in OUTCOMES]
    each = max(1, LISTED // sum(map(bool, by_outcome)))
    return [row for rows in by_outcome for row in rows[:each]]


def rebuilding(config: DatasetConfig, collected: Collection | None, properties: bool = False) -> Iterator[str]:
    yield "## How it was made"
    command = ["hf-wsl", "tokenize", "PATH..."] if collected is None else [*collected.command]
    defaults = type(config)().settings()
    options = []
    for key, value in config.settings().items():
        if value != defaults.get(key):
            name = f"--tokens.{key}" if properties else f"--{key}"
            options += [name, str(value).lower() if isinstance(value, bool) else str(value)]
    line = shlex.join([*command, "--output_dir", "DIR", *options])
    if properties:
        line = shlex.join(["hf-wsl", "zoo", "--tokenize", "true", "--output_dir", "DIR", *options])
    if collected is not None and collected.endpoint != HUB:
        line = f"HF_ENDPOINT={shlex.quote(collected.endpoint)} {line}"
    yield f"```\n{line}\n```"
    if properties:
        yield "With the options of the zoo, which trains the models; the config `properties` tells those of each."
    if collected is not None:
        queries = ", ".join(f"`{query}` {number:,}" for query, number in collected.queries.items())
        yield (
            f"On {collected.listed_on}, {collected.endpoint} listed {collected.num_listed:,} models ({queries}; some "
            f"under several). {collected.num_examined:,} of them were looked at, in their order. The Hub changes; "
            "the config `models` names the commit of each (`revision`), and `hf-wsl collect` takes a list "
            "of `model_id@revision`, too."
        )
    yield f"All settings, and what tells that a source has changed, are in `{REPORT_FILE}`."


def _grouped(rows: Sequence[Row], column: str) -> list[tuple[str, ...]]:
    """Lines of a table of models, tokens and parameters by the values of a column, the largest first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[column] or NOT_STATED, []).append(row)
    ranked = sorted(groups.items(), key=lambda item: (-_sum(item[1], "num_tokens"), item[0]))
    lines = [_group_line(name, group) for name, group in ranked[:LISTED]]
    if rest := [row for _, group in ranked[LISTED:] for row in group]:
        lines.append(_group_line(f"{len(ranked) - LISTED:,} more", rest))
    return lines


def _group_line(name: str, rows: Sequence[Row]) -> tuple[str, ...]:
    return plain(name), *(f"{n:,}" for n in (len(rows), _sum(rows, "num_tokens"), _sum(rows, "num_parameters")))


def _head(groups: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    rest = groups[LISTED:]
    return [*groups[:LISTED], *([(f"{len(rest):,} more groups", sum(size for _, size in rest))] if rest else [])]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _sum(rows: Sequence[Row], column: str) -> int:
    return sum(row[column] for row in rows)
