"""Every option of a lab zoo, described once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets_scripts.tokenize_config import TokenizeConfig
from hf_wsl.options import ConfigError, build, coerce, option

from ..data.data_config import ImageDataConfig


OPTIMIZERS = ("sgd", "adam", "adamw")
INITIALIZATIONS = (
    "default",
    "kaiming_uniform",
    "kaiming_normal",
    "xavier_uniform",
    "xavier_normal",
    "uniform",
    "normal",
)
DEFAULT = "default"
# Pixels as they are: a zoo's members see the same images in every epoch, unless `augment` is set.
PLAIN_IMAGES = {"image_size": 28, "center_crop": 1.0}
AUGMENTED_IMAGES = {"image_size": 32, "center_crop": 1.0}
# Change how a zoo is made, or what is made of it, and not its members.
FREE = ("num_workers", "tokenize", "tokens", "output_dir", "overwrite_output_dir")


@dataclass(frozen=True)
class ZooConfig:
    """The members of a lab zoo and their training. Raises ConfigError on values that cannot work.

    The defaults are the small CNN of the model-zoo literature (Unterthiner 2020; Schürholt 2022), with a checkpoint
    after every epoch.
    """

    EXAMPLE = (
        "hf-wsl zoo --data.images mnist --data.channels 1 --seeds 50 --learning_rates 3e-4,1e-3 "
        "--activations relu,tanh --epochs 10 --num_workers 2 --output_dir zoo"
    )

    architecture: str = option("small_cnn", "small_cnn, resnet18_slim, or the name of a timm architecture")
    architecture_args: dict = option({}, "of a timm architecture: --architecture_args.img_size 32")
    data: dict = option({}, "options of the images", of=(ImageDataConfig,))
    augment: bool = option(False, "random crops and flips of training images, as the options of the data say")
    seeds: int = option(1, "members of every combination of the settings below; no two members share a seed")
    learning_rates: list = option(["1e-3"], "constant over a run")
    weight_decays: list = option(["0"], "coupled in sgd and adam, decoupled in adamw, on all parameters")
    optimizers: list = option(["adam"], f"of {', '.join(OPTIMIZERS)}; sgd has momentum 0.9")
    activations: list = option([DEFAULT], "names of activations in timm: relu, gelu, tanh, silu, leaky_relu ...")
    initializations: list = option([DEFAULT], f"of {', '.join(INITIALIZATIONS)}; default: the architecture's own")
    dropouts: list = option(["0"], "dropout rates; of a timm architecture its drop_rate")
    sampling: str = option("grid", "all combinations, or num_members of them drawn at random", ("grid", "random"))
    num_members: int = option(0, "how many combinations are drawn; of sampling random")
    parents: str = option("", "another zoo, whose last checkpoints this one's members are fine-tuned from")
    epochs: int = option(25, "passes over the training images")
    checkpoint_epochs: list = option([], "epochs to keep and measure, 0 is the initial state; empty: 1, 2, ... epochs")
    batch_size: int = option(64, "images a step")
    max_measured: int = option(0, "training images that train_accuracy is measured on, evenly spaced; 0: all")
    stack_size: int = option(8, "small CNNs of one structure that are trained at once; other models go one by one")
    seed: int = option(0, "of the members' seeds, the random combinations and the split")
    license: str = option("", "of the members, for those who get them: cc0-1.0, mit ...; empty: none is stated")
    num_workers: int = option(1, "processes, each on one thread; the zoo does not depend on it")
    tokenize: bool = option(False, "make the tokenized dataset too, in the folder tokens")
    tokens: dict = option({}, "options of the tokenized dataset, see --tokenize", of=(TokenizeConfig,))
    output_dir: str = option("", "gets models/, properties.parquet and settings.json")
    overwrite_output_dir: bool = option(False, "delete the zoo that output_dir holds, and begin anew")

    def __post_init__(self) -> None:
        for name in ("output_dir", "data"):
            if not getattr(self, name):
                raise ConfigError(f"option '{name}' is missing: --{name}{'.images DIR' if name == 'data' else ' DIR'}")
        lowest = {"seeds": 1, "epochs": 0, "batch_size": 1, "stack_size": 1, "num_workers": 1}
        lowest |= {"max_measured": 0, "seed": 0, "num_members": int(self.sampling == "random")}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ConfigError(f"option '{name}' is {getattr(self, name)}; it must be at least {least}")
        if self.num_members and self.sampling == "grid":
            raise ConfigError("option 'num_members' is of sampling random; leave it out, or set --sampling random")
        for name, known in (("optimizers", OPTIMIZERS), ("initializations", INITIALIZATIONS)):
            for value in getattr(self, name):
                if value not in known:
                    raise ConfigError(f"option '{name}' names '{value}'; choose among {', '.join(known)}")
        for name, values in self.grid().items():
            if not values:
                raise ConfigError(f"option '{name}' is empty; give one value at least")
        for name, low, high in (("learning_rates", 0, None), ("weight_decays", 0, None), ("dropouts", 0, 1)):
            for value in self.grid()[name]:
                if value < low or (high is not None and value >= high) or (name == "learning_rates" and value == 0):
                    raise ConfigError(f"option '{name}' has {value}, which is out of range")
        if self.parents:
            for name in ("activations", "initializations"):
                if getattr(self, name) != [DEFAULT]:
                    raise ConfigError(f"option '{name}' is given, but members with parents have theirs. Leave it out")
        for epoch in self.kept_epochs:
            if not int(bool(self.parents)) <= epoch <= self.epochs:
                note = "; epoch 0 of a fine-tuned member would be its parent" if self.parents else ""
                raise ConfigError(f"option 'checkpoint_epochs' has {epoch}, out of {self.epochs} epochs{note}")
        self.data_config, self.tokenize_config  # noqa: B018 - an unknown option is refused here

    def grid(self) -> dict[str, list[Any]]:
        """The lists whose combinations are the members' settings, numbers read."""
        names = ("optimizers", "activations", "initializations")
        numbers = ("dropouts", "learning_rates", "weight_decays")
        read = {name: [coerce(value, float, f"option '{name}'") for value in getattr(self, name)] for name in numbers}
        return {name: list(getattr(self, name)) for name in names} | read

    @property
    def kept_epochs(self) -> list[int]:
        given = [coerce(value, int, "option 'checkpoint_epochs'") for value in self.checkpoint_epochs]
        return sorted(set(given)) or list(range(1, self.epochs + 1))

    @property
    def data_config(self) -> ImageDataConfig:
        defaults = AUGMENTED_IMAGES if self.augment else PLAIN_IMAGES
        return build(ImageDataConfig, ("defaults of zoos", defaults), ("option 'data'", self.data))

    @property
    def tokenize_config(self) -> TokenizeConfig:
        return build(
            TokenizeConfig, ("command line", {"num_workers": self.num_workers}), ("option 'tokens'", self.tokens)
        )

    def settings(self) -> dict[str, Any]:
        """The settings that make the zoo; JSON-serializable. Without a license as before there was such an option."""
        resolved = {**asdict(self), **self.grid(), "data": asdict(self.data_config)}
        if self.parents:
            resolved["parents"] = str(Path(self.parents).absolute())  # the zoo may be gone on with from elsewhere
        unset = () if self.license else ("license",)
        return {name: value for name, value in resolved.items() if name not in (*FREE, *unset)}
