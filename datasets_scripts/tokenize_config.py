"""The options of `tokenize`, each described once: the command line's help is made of the field metadata."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_wsl.options import REQUIRED, argument, option

from .schema import MAX_WINDOW_SIZE, PAYLOAD_DTYPES


class TokenizeError(ValueError):
    """A run that cannot start, or that ended without a dataset; the message says why and what to do."""


@dataclass(frozen=True)
class DatasetConfig:
    """Options that decide the bytes of a dataset, beside its models; and `num_workers`, which does not.

    They are common to `hf-wsl tokenize` and `hf-wsl collect`.

    Raises:
        TokenizeError: a value out of range or not among the choices.
    """

    tokenization: str = option(
        "dense", "dense: layers flattened and cut; sparse: output rows cut, as SANE does.", ("dense", "sparse")
    )
    token_size: int = option(230, "Entries per token, d_t (the paper: 230 dense, 288 sparse).")
    position_unit: str = option(
        "token", "What the third position counts within a layer; row needs sparse tokens.", ("token", "row")
    )
    batch_norm_statistics: str = option(
        "carry",
        "carry: running means and variances stay out of the tokens; tokenize: taken in.",
        ("carry", "tokenize"),
    )
    layer_normalization: bool = option(
        False,
        "Store each layer's weights less the layer's mean over the training models, in its standard deviations, as "
        "SANE does: for a zoo of one architecture. Models with other layers are refused.",
    )
    window_size: int = option(MAX_WINDOW_SIZE, f"Tokens per row, at most {MAX_WINDOW_SIZE}.")
    dtype: str = option(
        "float16",
        "Of the stored weights. float16 rounds; a model with larger weights than it holds is refused.",
        PAYLOAD_DTYPES,
    )
    split_by: str = option(
        "owner",
        "What a split never divides, beside duplicates: all models of an owner, or one model.",
        ("owner", "model"),
    )
    seed: int = option(0, "Of the draw of the validation split.")
    min_parameters: int | None = option(
        None, "Models with fewer floating-point entries are refused; by default only mere remains of checkpoints."
    )
    max_shard_size: str = option("500MB", "Largest Parquet file, e.g. 500MB or 2GB.", metavar="SIZE")
    max_row_group_size: str = option(
        "32MB", "Weights per row group, what a streaming reader holds at once; at least one row.", metavar="SIZE"
    )
    split_files_by_family: bool = option(
        False, "Give the windows of each family Parquet files, and so a dataset config, of their own."
    )
    allow_nonfinite: bool = option(False, "Admit models with NaN and infinite weights, which are stored as they are.")
    title: str = option("Tokenized model weights", "Heading of the dataset card.")
    num_workers: int = option(1, "Processes that work on models side by side. The result does not depend on it.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value not in choices:
                raise TokenizeError(f"{field.name}={value!r} is not known; choose one of {', '.join(choices)}.")
        if not 1 <= self.window_size <= MAX_WINDOW_SIZE:
            raise TokenizeError(f"window_size is {self.window_size}; rows hold 1 to {MAX_WINDOW_SIZE} tokens.")
        if not 1 <= self.token_size < 1 << 16:
            raise TokenizeError(f"token_size is {self.token_size}; a token holds 1 to {(1 << 16) - 1} entries.")
        if self.num_workers < 1:
            raise TokenizeError(f"num_workers is {self.num_workers}; it is at least 1.")
        parse_size("max_shard_size", self.max_shard_size)
        parse_size("max_row_group_size", self.max_row_group_size)

    @property
    def part_dtype(self) -> str:
        """Of the weights before their layers are normalized: rounded once, at the end."""
        return "float32" if self.layer_normalization else self.dtype

    @property
    def token_bytes(self) -> int:
        """Payload of one token, its count of valid entries included."""
        return self.token_size * (2 if self.dtype == "float16" else 4) + 2

    @property
    def shard_bytes(self) -> int:
        return parse_size("max_shard_size", self.max_shard_size)

    @property
    def row_group_bytes(self) -> int:
        return parse_size("max_row_group_size", self.max_row_group_size)

    def settings(self) -> dict[str, Any]:
        """All that decides the bytes of the dataset, for the fingerprint of a run."""
        settings = {key: value for key, value in dataclasses.asdict(self).items() if key != "num_workers"}
        if not self.allow_nonfinite:  # a run of before there was the option is the same one
            del settings["allow_nonfinite"]
        return settings


@dataclass(frozen=True)
class TokenizeConfig(DatasetConfig):
    """The options of `hf-wsl tokenize`; see `DatasetConfig`."""

    validation_fraction: float = option(0.1, "Share of all tokens that the validation split holds at most.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.validation_fraction < 1:
            raise TokenizeError(f"validation_fraction is {self.validation_fraction}; it lies in [0, 1).")


@dataclass(frozen=True)
class TokenizeOptions(TokenizeConfig):
    """The command line of `hf-wsl tokenize`."""

    EXAMPLE = "hf-wsl tokenize models/ --output_dir tokens --num_workers 2"

    sources: list = argument(
        "Models, folders of models, Hub ids, parts of these (org/name:subfolder#key@revision, file.pt#all), or lists."
    )
    output_dir: Path = option(REQUIRED, "Folder of the dataset.", metavar="DIR", group="output", was=("output",))
    overwrite_output_dir: bool = option(False, "Delete the dataset that output_dir holds, and begin anew.")


def parse_size(name: str, text: str) -> int:
    """Bytes of a size such as "500MB" (decimal units, as the Hub counts).

    Raises:
        TokenizeError: not a positive number with one of the units.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2].strip(), text[-2:].upper()
    if unit not in units or not number.isdecimal() or int(number) == 0:
        raise TokenizeError(f"{name}={text!r} is not a size; write it like 500MB (units: KB, MB, GB).")
    return int(number) * units[unit]
