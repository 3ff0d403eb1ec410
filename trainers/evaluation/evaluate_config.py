"""Every option of an evaluation, described once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hf_wsl.options import PRECISION_HELP, PRECISIONS, ConfigError, build, nearest, option

from ..data.data_config import DATA, ImageDataConfig, TextDataConfig
from ..finetuning.finetune_options import FinetuneOptions


INIT, FEW_SHOT = "init", "few-shot"
# arm -> what its initial weights are; the order of tables and legends.
ARMS = {
    "anchor": "the trained model itself: the upper bound",
    "generated": "drawn by the backbone around the anchors' latents, the best of the draws on the validation split",
    "bootstrapped": "drawn like 'generated', the best draws of a round being the anchors of the next",
    "interpolated": "decoded from points between the latents of the first two anchors",
    "reconstructed": "the anchor through the backbone and back, without the noise of a draw",
    "PCA": "the anchor through PCA over tokens to the same latent size, fitted on the backbone's training models",
    "random projection": "the anchor through a random orthogonal projection to the same latent size",
    "anchor + noise": "the anchor plus Gaussian noise, each tensor as far off as the generated one's; as many draws, "
    "selected alike",
    "anchor rotated": "the anchor turned in a random direction, each tensor by the generated one's angle and to its "
    "length; as many draws, selected alike",
    "anchor permuted": "the anchor with the entries of each sampled tensor shuffled: its statistics, nothing else",
    "inherited only": "what generation took from the anchor untouched, all else as in scratch",
    "scratch": "the architecture's own random initialization: the lower bound",
}
# The arms of a comparison of donors, in the order in which they are run: what decides comes first.
DONOR_ARMS = {
    "tuned scratch": "the architecture's own initialization, its learning rate the best of three on validation",
    "weight selection": "evenly spaced entries of a donor's first blocks (Xu et al. 2023)",
    "resize": "a donor resized: one map for every space of neurons, blocks by relative depth",
    "fit": "resized, then every map fitted in closed form on unlabeled training images",
    "fit + head": "the same, and a ridge classifier from the images' labels",
    "distilled scratch": "the architecture's own initialization, trained towards the donor's outputs on those images",
    "distilled fit": "the fitted network, trained likewise",
    "untrained donor": "fitted to a donor of random weights",
    "permuted donor": "fitted to a donor with the entries of every parameter shuffled",
    "scratch": "the architecture's own random initialization: the lower bound",
}
# Arms of the few-shot protocol that must be asked for, by their options.
ON_REQUEST = {"bootstrapped": "bootstrap_rounds", "interpolated": "interpolation_points"}
# What may change between two runs in one folder: each outcome is that of its own arm and seed.
FREE = ("arms", "seeds", "num_workers", "cache_dir", "output_dir", "overwrite_output_dir")


@dataclass(frozen=True)
class EvaluateConfig:
    """Options of a comparison of arms. Raises ConfigError on values that cannot work, naming the option.

    The protocols' numbers are the paper's (appendix C.2): "init" draws 5 models around 1 anchor and fine-tunes the
    best, "few-shot" draws 50 around 5 anchors, keeps 10 and trains none.
    """

    EXAMPLE = (
        "hf-wsl evaluate --backbone backbone --target resnet18 --anchors models/resnet18 --data.images cifar10 "
        "--data.image_size 32 --tokens tokens --output_dir evaluation"
    )

    backbone: str = option("", "folder or Hub id of a WSL model")
    target: str = option("", "timm name, or folder or Hub id of a transformers or timm model: what is generated")
    target_kwargs: dict = option({}, "of the target, as its library takes them: --target_kwargs.img_size 32")
    anchors: list = option([], "trained models of that architecture, separated by commas: folders or Hub ids")
    donors: list = option([], "trained models of other sizes, in place of anchors: starting weights from them")
    donor_modules: list = option([], "FILE.py:FUNCTION for every donor whose own files do not name its architecture")
    num_images: int = option(512, "donors: training images, or blocks of text, that are fitted on")
    distill_epochs: int = option(5, "donors: passes over them in the arms that are distilled")
    stem: str = option(
        "adapt", "of an anchor for images of another number of channels", choices=("adapt", "initialize")
    )
    task: str = option("image-classification", "what the models are for", choices=tuple(DATA))
    protocol: str = option(INIT, "fine-tune the best draw, or measure the best ones as they are", (INIT, FEW_SHOT))
    data: dict = option({}, "options of the data, images or text by the task", of=tuple(DATA.values()))
    finetune: dict = option({}, "options of the fine-tuning", of=(FinetuneOptions,), hidden=("seed",))
    tokens: str = option("", "tokenized dataset that PCA is fitted on: that of the backbone; empty: no PCA")
    pca_tokens: int = option(500_000, "tokens that PCA is fitted on, evenly spaced")
    arms: list = option([], f"arms to run, separated by commas; empty: all that can be ({', '.join(ARMS)})")
    seeds: int | None = option(
        None, "seeds, each with draws and a data order of its own; none: 3 for init, 1 for few-shot"
    )
    seed: int = option(0, "where the seeds begin")
    num_candidates: int | None = option(None, "draws of a seed; none: 5 for init, 50 for few-shot")
    num_kept: int | None = option(None, "best draws of a seed that are kept; none: 1 for init, 10 for few-shot")
    bandwidth: float = option(0.2, "of the kernel density on the anchors' latents")
    noise: str | None = option(
        None,
        "one draw of noise for all tokens, or one for each; none: as the backbone's code asks",
        ("shared", "independent"),
    )
    precision: str = option("auto", PRECISION_HELP, PRECISIONS)
    bootstrap_rounds: int = option(0, "few-shot: rounds of the arm 'bootstrapped'; 0: no such arm")
    interpolation_points: int = option(0, "few-shot: points of the arm 'interpolated'; 0: no such arm")
    batch_norm_images: int = option(512, "training images that batch-norm statistics are estimated on")
    num_workers: int = option(1, "processes on the CPU, each on one thread; the results do not depend on it")
    keep_models: bool = option(False, "save the generated models, as their own library loads them")
    cache_dir: str = option("", "folder for what evaluations may share (PCA); empty: in output_dir")
    output_dir: str = option("", "gets evaluation.json, evaluation.md, evaluation.png, and a record of every run")
    overwrite_output_dir: bool = option(False, "delete the evaluation that output_dir holds, and begin anew")

    def __post_init__(self) -> None:
        if self.donors:
            self._check_donors()
        for name in ("target", "output_dir", "data", *(() if self.donors else ("backbone", "anchors"))):
            if not getattr(self, name):
                how = ".images DIR, or --data.text FILE" if name == "data" else " …"
                raise ConfigError(f"option '{name}' is missing: --{name}{how}")
        for arm in self.arms:
            if arm not in self.known_arms:
                known = self.known_arms
                raise ConfigError(
                    f"option 'arms' names '{arm}'.{nearest(arm, known)} The arms are: {', '.join(known)}."
                )
        for name in (
            "seeds",
            "num_candidates",
            "num_kept",
            "num_workers",
            "batch_norm_images",
            "pca_tokens",
            "num_images",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"option '{name}' is {value}; it must be at least 1")
        for name in ("seed", "bandwidth", "bootstrap_rounds", "interpolation_points"):
            if getattr(self, name) < 0:
                raise ConfigError(f"option '{name}' is {getattr(self, name)}; it must not be negative")
        if self.kept > self.candidates:
            raise ConfigError(
                f"option 'num_kept' is {self.kept}, more than the {self.candidates} draws of num_candidates"
            )
        if self.protocol == INIT:
            if self.kept != 1:
                raise ConfigError("option 'num_kept' is of the few-shot protocol; init fine-tunes the best draw alone")
            if len(self.anchors) != 1 and not self.donors:
                raise ConfigError(
                    f"option 'anchors' names {len(self.anchors)} models; init draws around one. Leave the others out, "
                    "or take --protocol few-shot"
                )
        for name in ("num_classes", "num_labels", "in_chans", "num_channels"):
            if name in self.target_kwargs:
                raise ConfigError(f"option 'target_kwargs' has '{name}', which follows from the data. Leave it out")
        if "seed" in self.finetune:
            raise ConfigError("option 'finetune' has 'seed', which is that of each run. Set --seed, and --seeds")
        self.data_config, self.finetune_config  # noqa: B018 - an unknown option is refused here

    def _check_donors(self) -> None:
        if self.anchors:
            raise ConfigError("options 'anchors' and 'donors' are two comparisons. Leave one of them out")
        if self.protocol != INIT:
            raise ConfigError("option 'donors' is of the protocol init. Leave --protocol out")
        if self.donor_modules and len(self.donor_modules) != len(self.donors):
            raise ConfigError(
                f"option 'donor_modules' names {len(self.donor_modules)} for {len(self.donors)} donors; give one each"
            )

    @property
    def known_arms(self) -> dict[str, str]:
        return DONOR_ARMS if self.donors else ARMS

    @property
    def candidates(self) -> int:
        return self.num_candidates or (5 if self.protocol == INIT else 50)

    @property
    def kept(self) -> int:
        return self.num_kept or (1 if self.protocol == INIT else min(10, self.candidates))

    @property
    def run_seeds(self) -> list[int]:
        count = self.seeds or (3 if self.protocol == INIT else 1)
        return [1_000 * (self.seed + 1) + number for number in range(count)]

    @property
    def wanted_arms(self) -> list[str]:
        """In the order of tables; those that must be asked for by an option of theirs only if they are."""
        if self.donors:
            return [arm for arm in DONOR_ARMS if not self.arms or arm in self.arms]
        asked = [arm for arm in ARMS if arm not in ON_REQUEST or getattr(self, ON_REQUEST[arm])]
        return [arm for arm in ARMS if arm in self.arms] if self.arms else asked

    @property
    def data_config(self) -> ImageDataConfig | TextDataConfig:
        return build(DATA[self.task], ("option 'data'", self.data))

    @property
    def finetune_config(self) -> FinetuneOptions:
        return build(FinetuneOptions, ("option 'finetune'", self.finetune))

    def settings(self) -> dict[str, Any]:
        """The settings that all results in a folder must have in common; JSON-serializable."""
        resolved = {"data": asdict(self.data_config), "finetune": asdict(self.finetune_config)}
        own = {"num_candidates": self.candidates, "num_kept": self.kept}
        return {name: value for name, value in {**asdict(self), **own, **resolved}.items() if name not in FREE}
