"""The options of `hf-wsl search`, each described once."""

from dataclasses import dataclass
from pathlib import Path

from hf_wsl.options import ConfigError, argument, option


METRICS = ("cosine", "euclidean")
MODES = ("duplicates", "lineage")
# Of the calibration by planted copies, which the fingerprints' rule needs no more.
CALIBRATION = ("calibrate", "calibration", "sample", "max_parameters", "noises", "false_positive_rate", "fine_tunes")


@dataclass(frozen=True)
class SearchConfig:
    """The options of `hf-wsl search`. Raises ConfigError on options that contradict each other."""

    top: int = option(10, "Neighbors to show.")
    metric: str = option("cosine", "Distance of embeddings.", METRICS)
    standardize: bool = option(True, "Give every feature mean 0 and deviation 1 over the table first.")
    index: str = option("exact", "exact, faiss (exact too), or an approximate one of faiss: faiss:HNSW32.")
    duplicates: bool = option(False, "Group the models that are copies of each other.", was=CALIBRATION)
    lineage: bool = option(False, "Find who was fine-tuned from whom, by weights.")
    models: list = option([], "The models of the table, for what needs their weights; separated by commas.")
    allow_nonfinite: bool = option(False, "Take models that hold NaN or infinite weights too.")
    output_file: str = option("", "JSON file of the result.", metavar="FILE", was=("output_dir",), also=("output",))

    def __post_init__(self) -> None:
        if sum(getattr(self, mode) for mode in MODES) > 1:
            raise ConfigError(f"choose one of {', '.join('--' + mode for mode in MODES)}")
        if self.lineage and not self.models:
            raise ConfigError("option 'lineage' reads weights: name the models of the table with --models")


@dataclass(frozen=True)
class SearchOptions(SearchConfig):
    """The command line of `hf-wsl search`."""

    EXAMPLE = "hf-wsl search embeddings.parquet org/some-model --top 10"

    overwrite_output_file: bool = option(False, "Replace a file that is there.")
    table: Path = argument("Parquet file that `hf-wsl embed` wrote.")
    query: str | None = argument("A model_id of the table, or a model: path or Hub id (org/name@revision).", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.query is None) == (not any(getattr(self, mode) for mode in MODES)):
            raise ConfigError(
                "name one model to search for (a row of the table, a path or a Hub id), or one of --duplicates and "
                "--lineage"
            )


@dataclass(frozen=True)
class CompareOptions:
    """The command line of `hf-wsl compare`."""

    EXAMPLE = "hf-wsl compare path/to/model org/some-model"

    first: str = argument("A model: path or Hub id (org/name:subfolder#key@revision).")
    second: str = argument("The model beside it.")
    table: Path | None = option(
        None, "Parquet file of `hf-wsl embed profile`, whose models stand for strangers; default: public models."
    )
    allow_nonfinite: bool = option(False, "Compare models that hold NaN or infinite weights too.")
    output_file: Path | None = option(
        None,
        "Page (.html) or figures (.json) of the comparison.",
        metavar="FILE",
        group="output",
        also=("output",),
    )
    overwrite_output_file: bool = option(False, "Replace a file that is there.")


@dataclass(frozen=True)
class ScanOptions:
    """The command line of `hf-wsl scan`."""

    EXAMPLE = "hf-wsl scan path/to/model --table embeddings.parquet"

    model: str = argument("A model: path or Hub id (org/name:subfolder#key@revision).")
    table: Path | None = option(
        None, "Parquet file of `hf-wsl embed profile` to look it up in; default: public models."
    )
    top: int = option(5, "Neighbors to show beside copies.")
    allow_nonfinite: bool = option(False, "Scan a model that holds NaN or infinite weights too.")
