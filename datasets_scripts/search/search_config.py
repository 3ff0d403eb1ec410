"""The options of `hf-wsl search`, each described once."""

import math
from dataclasses import dataclass
from pathlib import Path

from hf_wsl.options import ConfigError, argument, option


METRICS = ("cosine", "euclidean")
MODES = ("duplicates", "calibrate", "lineage")


@dataclass(frozen=True)
class SearchConfig:
    """The options of `hf-wsl search`. Raises ConfigError on options that contradict each other."""

    top: int = option(10, "Neighbors to show.")
    metric: str = option("cosine", "Distance of embeddings.", METRICS)
    standardize: bool = option(True, "Give every feature mean 0 and deviation 1 over the table first.")
    index: str = option("exact", "exact, faiss (exact too), or an approximate one of faiss: faiss:HNSW32.")
    duplicates: bool = option(False, "Group the models that are copies of each other.")
    calibration: str = option("", "With --duplicates: file that --calibrate wrote, for near copies.")
    calibrate: bool = option(False, "Measure at which distances copies lie, on copies planted for it.")
    lineage: bool = option(False, "Find who was fine-tuned from whom, by weights.")
    models: list = option([], "The models of the table, for what needs their weights; separated by commas.")
    sample: int = option(100, "With --calibrate: models to plant copies of.")
    max_parameters: int = option(0, "With --calibrate: plant no copies of models with more entries; 0: of any.")
    noises: list = option(["0.001", "0.01", "0.1", "0.3"], "With --calibrate: noise on copies, relative.")
    false_positive_rate: float = option(
        0.01, "With --calibrate: share of models that may have a stranger within the threshold."
    )
    fine_tunes: list = option([], "With --calibrate: PARENT=CHILD of the table, beside what zoos state.")
    seed: int = option(0, "With --calibrate: of the sample and the copies.")
    output_file: str = option("", "JSON file of the result.", metavar="FILE", was=("output_dir",), also=("output",))

    def __post_init__(self) -> None:
        if sum(getattr(self, mode) for mode in MODES) > 1:
            raise ConfigError(f"choose one of {', '.join('--' + mode for mode in MODES)}")
        for mode in ("calibrate", "lineage"):
            if getattr(self, mode) and not self.models:
                raise ConfigError(f"option '{mode}' reads weights: name the models of the table with --models")
        if self.calibrate and not self.output_file:
            raise ConfigError("option 'calibrate' writes a file: name it with --output_file")
        if self.calibration and not self.duplicates:
            raise ConfigError("option 'calibration' is of --duplicates")
        for pair in self.fine_tunes:
            if pair.count("=") != 1:
                raise ConfigError(f"option 'fine_tunes' has '{pair}'; write PARENT=CHILD, two ids of the table")
        try:
            finite = all(math.isfinite(size) for size in self.noise_sizes)
        except ValueError as error:
            raise ConfigError(f"option 'noises' takes numbers, separated by commas ({error})") from error
        if not finite:
            raise ConfigError(f"option 'noises' takes finite numbers; it has {', '.join(self.noises)}")

    @property
    def noise_sizes(self) -> list[float]:
        return [float(size) for size in self.noises]

    @property
    def fine_tune_pairs(self) -> list[tuple[str, str]]:
        return [tuple(pair.split("=")) for pair in self.fine_tunes]


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
                "name one model to search for (a row of the table, a path or a Hub id), or one of --duplicates, "
                "--calibrate and --lineage"
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
