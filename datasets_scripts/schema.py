"""The tokenized dataset on disk: its folders, files and columns, and nothing that reads or writes them.

    README.md                                    card; its front matter lists the configs `windows` and `models`
    windows/train-00000-of-00003.parquet         one row a window of consecutive tokens of one model
    windows/train-resnet-00000-of-00003.parquet  the same, where each family has files, and so a config, of its own
    windows/train-local-00000-of-00001.parquet   windows of models whose license does not let others pass them on:
                                                 read with the others here, left behind when the dataset is published
    models/train-00000-of-00001.parquet          one row a model; models/refused-* holds those that were refused
    properties/train-00000-of-00001.parquet      one row a model, of lab zoos: settings, accuracies ...
    preprocessor_config.json                     the feature extractor's settings
    tokenize.json                                settings, sources and counts of the run that made the dataset

A token's mask is one number (`valid_entries`: the first so many entries hold weights) and positions follow from the
`segment_*` columns (`modeling_wsl.tokens.manifest.positions_from_segments`), so neither is stored as an array.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Features


FORMAT_VERSION = 3  # 3: `license` and `redistributable` are columns of `models`; files of local models lie apart
WINDOWS, MODELS, PROPERTIES = "windows", "models", "properties"
TRAIN, VALIDATION, TEST, REFUSED = "train", "validation", "test", "refused"  # test: of lab zoos
SPLITS = (TRAIN, VALIDATION, TEST)  # of what is learned from and measured on
WITHHELD = (
    "withheld"  # split, status and outcome, in published datasets: models whose license keeps their weights back
)
LOCAL = "local"  # in the names of files that stay here when a dataset is published
ACCEPTED = "accepted"  # of the column `status`, beside REFUSED
MAX_WINDOW_SIZE = 4096
PAYLOAD_DTYPES = ("float16", "float32")  # bfloat16 exists in neither Arrow nor Parquet

CARD_FILE = "README.md"
EXTRACTOR_FILE = "preprocessor_config.json"
REPORT_FILE = "tokenize.json"
WORK_FOLDER = ".tokenize"


def window_features(token_size: int, dtype: str = "float16") -> Features:
    """Columns of the config `windows`.

    Args:
        token_size: d_t, entries per token.
        dtype: of the payload, "float16" or "float32".

    Returns:
        model_id; window_index within the model; token_start, n of the first token; num_tokens; tokens
        `[num_tokens, d_t]`; valid_entries `[num_tokens]`; and four lists
        of one entry a `modeling_wsl.tokens.manifest.Segment`.
    """
    from datasets import Features, List, Value  # here: the options of commands need this module before the library

    return Features(
        {
            "model_id": Value("string"),
            "window_index": Value("int32"),
            "token_start": Value("int64"),
            "num_tokens": Value("int32"),
            "tokens": List(List(Value(dtype), length=token_size)),
            "valid_entries": List(Value("uint16")),
            "segment_layer": List(Value("int32")),
            "segment_position": List(Value("int64")),
            "segment_stride": List(Value("int32")),
            "segment_length": List(Value("int32")),
        }
    )


def model_features() -> Features:
    """Columns of the config `models`. A refused model has an outcome (`outcomes.py`), a reason and no windows.

    `architecture` is what the model's own files say (a timm name, a model type), `family` what `composition.py` makes
    of it. `redistributable` says whether others may pass the weights on (`licenses.py`); it is false for a copy of a
    model whose license forbids it, whatever license the copy states. `duplicate_group` joins models of bit-identical
    weights, `near_copy_group` fine-tunes of one base; both are named after their first model.
    """
    from datasets import Features, Value  # as above

    return Features(
        {
            "model_id": Value("string"),
            "source": Value("string"),
            "revision": Value("string"),
            "owner": Value("string"),
            "license": Value("string"),
            "redistributable": Value("bool"),
            "library": Value("string"),
            "architecture": Value("string"),
            "family": Value("string"),
            "task": Value("string"),
            "training_data": Value("string"),
            "base_model": Value("string"),
            "num_parameters": Value("int64"),
            "num_tokens": Value("int64"),
            "num_windows": Value("int32"),
            "padding": Value("float64"),
            "manifest": Value("string"),
            "weights_sha256": Value("string"),
            "duplicate_group": Value("string"),
            "near_copy_group": Value("string"),
            "split": Value("string"),
            "status": Value("string"),
            "outcome": Value("string"),
            "reason": Value("string"),
        }
    )


def shard_path(config: str, split: str, index: int, count: int, family: str | None = None, local: bool = False) -> str:
    """Path of a Parquet file relative to the dataset's folder: `windows/train-00000-of-00003.parquet`.

    Args:
        family: whose files lie apart: `windows/train-resnet-00000-of-00003.parquet`.
        local: of models that are not to be published: `windows/train-local-00000-of-00001.parquet`.
    """
    part = "-".join(filter(None, (split, family, LOCAL * local)))
    return f"{config}/{part}-{index:05d}-of-{count:05d}.parquet"


def splits_by_family(files: Iterable[tuple[str | None, str]]) -> dict[str, list[str]]:
    """Family -> the splits in which it has files, both in order of names; None is no family.

    Args:
        files: family and split of each.
    """
    splits: dict[str, set[str]] = {}
    for family, split in files:
        if family is not None:
            splits.setdefault(family, set()).add(split)
    return {family: sorted(splits[family]) for family in sorted(splits)}


def card_configs(
    splits: Mapping[str, Sequence[str]], content: str, families: Mapping[str, Sequence[str]] | None = None
) -> list[dict[str, Any]]:
    """The `configs:` of the card's front matter, by which `load_dataset` finds the files.

    Args:
        splits: config -> the splits that have at least one row, e.g. `{"windows": ["train", "validation"]}`.
        content: a hash of what the dataset holds. `datasets` tells local folders apart by their last name and their
            front matter alone: without it, another dataset in a folder of the same name comes out of its cache.
        families: family -> the splits in which it has windows, where families have files of their own: each becomes a
            config `windows-<family>` (paper, Table 2).
    """

    def entry(name: str, folder: str, patterns: Mapping[str, str]) -> dict[str, Any]:
        return {
            "config_name": name,
            "description": f"content {content}",
            **({"default": True} if name == WINDOWS else {}),
            "data_files": [{"split": split, "path": f"{folder}/{pattern}"} for split, pattern in patterns.items()],
        }

    configs = [entry(name, name, {s: f"{s}-*.parquet" for s in names}) for name, names in splits.items()]
    parts = [  # a number follows, or `LOCAL` and a number
        entry(f"{WINDOWS}-{family}", WINDOWS, {s: f"{s}-{family}-[0-9{LOCAL[0]}]*.parquet" for s in names})
        for family, names in (families or {}).items()
    ]
    return [*configs, *parts]
