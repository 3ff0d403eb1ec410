"""Every option of `hf-wsl generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_wsl.options import PRECISION_HELP, PRECISIONS, REQUIRED, ConfigError, argument, build, option

from ..data.data_config import ImageDataConfig, TextDataConfig


# The values of `METHODS` and `DONOR_METHODS` of the library, which takes seconds to import.
AROUND_ANCHORS, OF_DONORS = ("density", "interpolation"), ("fit", "resize", "select")
# Options of draws around anchors, and of donors, with the values that they have when they are not given.
DRAWS = {"bandwidth": 0.2, "noise": None, "stem": "adapt"}
TRANSFERS = {"data": {}, "labels": False, "distill_epochs": 0, "anchor_modules": []}


@dataclass(frozen=True)
class GenerateOptions:
    """The command line of `hf-wsl generate`. Raises ConfigError on values that cannot work, naming the option."""

    EXAMPLE = "hf-wsl generate default resnet18 --anchors models/resnet18 --output_dir generated --num_samples 5"

    backbone: str = argument("Folder or Hub id of a WSL model, or default; donors need none.")
    target: str = argument(
        "timm name, folder or Hub id (org/name@revision) of a transformers or timm model, or FILE.py:FUNCTION that "
        "builds one."
    )
    output_dir: Path = option(
        REQUIRED, "Folder; every model gets a folder of its own in it.", metavar="DIR", was=("output",)
    )
    anchors: list = option(
        [], "Trained models (org/name:subfolder#key@revision), for several repeat it; as donors of any size."
    )
    method: str | None = option(
        None,
        "Around anchors of the same architecture: density (the default) or interpolation. From donors of other "
        "sizes: fit (the default with --data), resize, or select (weight selection).",
        (*AROUND_ANCHORS, *OF_DONORS),
    )
    num_samples: int | None = option(None, "Models to generate; none: 1, of donors one each.")
    seed: int = option(0, "Of all draws.")
    bandwidth: float = option(0.2, "Of the kernel density on the anchors' latents.")
    noise: str | None = option(None, "One draw for all tokens, or one each.", ("shared", "independent"))
    num_classes: int | None = option(None, "Of the target, where other than the anchors'.")
    in_channels: int | None = option(None, "Of its images, where they differ from the anchors'.")
    target_kwargs: dict = option({}, "Of the target, as its library takes them: --target_kwargs.img_size 32")
    initialize: list = option([], "Modules or tensors of the target to initialize anew.")
    stem: str = option("adapt", "What becomes of a stem for other channels.", ("adapt", "initialize"))
    data: dict = option({}, "Donors: unlabeled images or text of their domain.", of=(ImageDataConfig, TextDataConfig))
    num_images: int = option(512, "Donors: training images, or blocks of text, to fit on.")
    labels: bool = option(False, "Donors: fit a classifier to the images' labels.")
    distill_epochs: int = option(0, "Donors: passes over the images in which the target learns the donor's outputs.")
    anchor_modules: list = option(
        [], "Donors: FILE.py:FUNCTION for every anchor whose own files do not name its architecture."
    )
    revision: str | None = option(None, "Branch, tag or commit of a backbone on the Hub.")
    precision: str = option("auto", PRECISION_HELP, PRECISIONS)
    allow_nonfinite: bool = option(False, "Admit anchors with NaN and infinite weights.")
    overwrite_output_dir: bool = option(False, "Delete models of other settings in output_dir first.")

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise ConfigError(f"option 'num_samples' is {self.num_samples}; it must be at least 1")
        if self.num_images < 1:
            raise ConfigError(f"option 'num_images' is {self.num_images}; it must be at least 1")
        if self.bandwidth < 0:
            raise ConfigError(f"option 'bandwidth' is {self.bandwidth}; it must not be negative")
        if not self.anchors:
            raise ConfigError("option 'anchors' is empty; give trained models to take weights from")
        if self.method == "interpolation" and len(self.anchors) != 2:
            raise ConfigError(f"option 'method' is interpolation, between 2 anchors; {len(self.anchors)} are given")
        if self.method == "fit" and not self.data:
            raise ConfigError("option 'method' is fit, which needs images (--data.images) or text (--data.text)")
        other = DRAWS if self.from_donors else TRANSFERS
        if given := [name for name, value in other.items() if getattr(self, name) != value]:
            kind = "draws around anchors, not of donors" if self.from_donors else "donors: take --method resize or fit"
            raise ConfigError(f"option '{given[0]}' is of {kind}")
        if self.from_donors and not self.data and (self.labels or self.distill_epochs):
            option_name = "labels" if self.labels else "distill_epochs"
            raise ConfigError(f"option '{option_name}' needs images: give --data.images")

    @property
    def from_donors(self) -> bool:
        return self.method in OF_DONORS or (self.method is None and bool(self.data))

    @property
    def data_config(self) -> ImageDataConfig | TextDataConfig | None:
        """What to fit on; None: nothing."""
        if not self.data:
            return None
        kind = TextDataConfig if "text" in self.data else ImageDataConfig
        return build(kind, ("option 'data'", self.data))

    def settings(self) -> dict[str, Any]:
        """The options that the models depend on, but for what is named by its content."""
        names = ("method", "num_samples", "seed", "num_classes", "in_channels", "target_kwargs", "initialize")
        names += (
            ("labels", "distill_epochs", "num_images", "data", "anchor_modules")
            if self.from_donors
            else (*DRAWS, "precision")
        )
        return {name: getattr(self, name) for name in names}
