"""The options of `hf-wsl collect`, each described once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_wsl.options import REQUIRED, argument, option

from ..tokenize_config import DatasetConfig, TokenizeError, parse_size


PAPER_TASKS = "image-classification,image-segmentation,depth-estimation,object-detection"
EXECUTORS = ("local", "slurm", "ray")
ORDERS = ("downloads", "likes", "last_modified", "created_at", "random")


@dataclass(frozen=True)
class CollectConfig(DatasetConfig):
    """The models to collect from the Hub (paper, section 2); see `DatasetConfig` for what becomes of them.

    Lists are written with commas. Options that do not change the dataset are named in `NOT_SETTINGS`.

    Raises:
        TokenizeError: a value out of range or not among the choices.
    """

    tasks: str = option(PAPER_TASKS, "Task tags to query, the paper's four by default.", group="models")
    tags: str = option("", "Further tags that every model must have.")
    author: str = option("", "Models of this user or organization only.")
    library: str = option("", "Models of this library only: transformers, timm, peft ...")
    search: str = option("", "Text that the id must contain, e.g. resnet.")
    licenses: str = option(
        "any", "any; redistributable: those that allow to pass the weights on; or a list, e.g. apache-2.0,mit."
    )
    order: str = option("downloads", "Which models come first; random is drawn from the seed.", ORDERS)
    num_train: int = option(2000, "Training models after which the collection ends.")
    num_validation: int = option(200, "Validation models among them.")
    max_candidates: int = option(0, "Models to look at, at most; 0 = as many as the Hub lists.")
    gated: str = option("refuse", "Models with access on request: refuse, or try with your token.", ("refuse", "try"))
    check: str = option(
        "loadable",
        "loadable: transformers or timm must load the model with no weight missing or left over, as in the paper; "
        "readable: its files alone must be sound.",
        ("loadable", "readable"),
    )
    max_parameters: str = option("2B", "Larger models are refused, e.g. 500M or 2B.", metavar="COUNT")
    max_download: str = option("10GB", "Models with more bytes of weights are refused.", metavar="SIZE")
    split_files_by_family: bool = option(
        True, "Give the windows of each family Parquet files, and so a dataset config, of their own (paper, Table 2)."
    )
    title: str = option("Tokenized models of the Hugging Face Hub", "Heading of the dataset card.")
    max_disk: str = option(
        "20GB", "Disk for weight files being read; at least twice max_download.", metavar="SIZE", group="resources"
    )
    retries: int = option(6, "Of a request that failed for a reason that may pass.")
    retry_pause: float = option(1.0, "Seconds before the first retry; each further one waits twice as long.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_train < 1 or self.num_validation < 0:
            raise TokenizeError(
                f"num_train={self.num_train}, num_validation={self.num_validation}: at least 1 and 0 are needed."
            )
        if self.max_candidates < 0 or self.retries < 0 or self.retry_pause < 0:
            raise TokenizeError("max_candidates, retries and retry_pause are not negative.")
        if not self.task_tags and not self.author and not self.search and not self.tag_list and not self.library:
            raise TokenizeError("Nothing is asked for: give tasks, tags, an author, a library, a search, or models.")
        if self.max_disk_bytes < 2 * self.max_download_bytes:
            raise TokenizeError(
                f"max_disk={self.max_disk} is less than twice max_download={self.max_download}: one half is kept for "
                "the largest model. Give more disk or a smaller max_download."
            )
        parse_count("max_parameters", self.max_parameters)

    @property
    def task_tags(self) -> list[str]:
        return split_list(self.tasks)

    @property
    def tag_list(self) -> list[str]:
        return split_list(self.tags)

    @property
    def num_models(self) -> int:
        return self.num_train + self.num_validation

    @property
    def max_download_bytes(self) -> int:
        return parse_size("max_download", self.max_download)

    @property
    def max_disk_bytes(self) -> int:
        return parse_size("max_disk", self.max_disk)

    @property
    def parameter_limit(self) -> int:
        return parse_count("max_parameters", self.max_parameters)

    def settings(self) -> dict[str, Any]:
        return {key: value for key, value in super().settings().items() if key not in NOT_SETTINGS}


@dataclass(frozen=True)
class CollectOptions(CollectConfig):
    """The command line of `hf-wsl collect`."""

    EXAMPLE = "hf-wsl collect --output_dir tokens --num_train 2000 --num_validation 200 --num_workers 4"

    models: list = argument("Hub ids (org/name@revision) or lists of them, instead of a query.", [])
    output_dir: Path = option(
        REQUIRED,
        "Folder of the dataset; on a file system that all ranks see.",
        metavar="DIR",
        group="output",
        was=("output",),
    )
    overwrite_output_dir: bool = option(False, "Delete the dataset that output_dir holds, and begin anew.")
    dry_run: bool = option(False, "Print what it would take; read no weights.")
    ranks: int = option(0, "Run on datatrove, with so many shares of the models; 0 = here.", group="several machines")
    executor: str = option("local", "Of the ranks.", EXECUTORS)
    executor_options: Path | None = option(
        None, "YAML file of further arguments of datatrove's executor: workers, time ...", metavar="FILE"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks < 0:
            raise TokenizeError(f"ranks is {self.ranks}; it is not negative.")
        if not self.ranks and (self.executor != "local" or self.executor_options is not None):
            raise TokenizeError("executor and executor_options are of a run in ranks: add --ranks N.")
        if self.ranks and self.overwrite_output_dir:
            raise TokenizeError("overwrite_output_dir: ranks share a folder, so none may delete it. Name another one.")


NOT_SETTINGS = ("num_workers", "max_disk", "retries", "retry_pause")


def split_list(text: str) -> list[str]:
    """The parts between the commas, without spaces and empty ones."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_count(name: str, text: str) -> int:
    """A count such as "500M" or "2B".

    Raises:
        TokenizeError: not a positive number with an optional unit.
    """
    units = {"K": 10**3, "M": 10**6, "B": 10**9}
    digits, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    if not digits.strip().isdecimal() or int(digits) == 0:
        raise TokenizeError(f"{name}={text!r} is not a count; write it like 500M (units: K, M, B).")
    return int(digits) * unit
