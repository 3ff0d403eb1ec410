"""`hf-wsl evaluate`: generated weights and every control, fine-tuned on the same data in the same order."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import default_collate

from datasets_scripts.embedding.linear_projection import LinearBaseline
from hf_wsl.options import ConfigError, build
from hf_wsl.run_folder import RunFolder
from modeling_wsl.checkpoints.checkpoint import open_checkpoint
from modeling_wsl.checkpoints.errors import CheckpointError
from modeling_wsl.configuration_wsl import WSLConfig
from modeling_wsl.feature_extraction_wsl import WSLFeatureExtractor
from modeling_wsl.generation.donors.networks import built, is_builder
from modeling_wsl.generation.generate import EXTRACTOR_SETTINGS
from modeling_wsl.generation.generated_model import package_versions
from modeling_wsl.generation.plan import plan_generation
from modeling_wsl.generation.settings import GenerationSettings
from modeling_wsl.generation.targets import resolve_target
from modeling_wsl.loading import find_backbone

from ..data.images.image_data import load_images
from ..data.text_data import load_text
from ..data.windows.dataset_source import DatasetSource
from ..finetuning.tasks import CAUSAL_LANGUAGE_MODELING, IMAGE_CLASSIFICATION
from ..pretrain import versions
from .arm_runs import MODELS, run_arms
from .comparison import Comparison, EvaluationProtocol, backbone_generator
from .controls import cached_pca
from .donor_arms import DonorComparison, open_donors
from .evaluate_config import FEW_SHOT, INIT, EvaluateConfig
from .evaluate_report import write_report
from .initial_weights import skip_reason
from .loading_check import check_loading


logger = logging.getLogger(__name__)
ENOUGH_SEEDS = 3
EVALUATION_FILE = "evaluation.json"
BACKBONE_SETTINGS = "backbone_settings"  # folder of a backbone without weights, which a reproduction puts there
CHECKED_EXAMPLES = 4  # that saved models are compared on


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Compares generated weights with every control (see `initial_weights.ARMS`) on one architecture and dataset.

    Everything that can be checked from names, shapes and labels is checked first. Run it again to go on after an
    interruption, or with more arms or seeds. With `num_workers` above 1 a script that calls this needs the usual
    `if __name__ == "__main__":`.

    Returns:
        The content of `output_dir/evaluation.json`: `config`, `identity` (hashes of weights and data), `versions`,
        `data`, `metric`, `arms` (arm -> `about`, `runs`, `summary`, see `run_arms`), `skipped` (arm -> why), `weights`
        (arm -> for each model how far it is from its anchor), `loading` (saved model -> its own library's loader, and
        how far its outputs are off), `ranked_by`, `guess` (accuracy of naming the most frequent class),
        `tokens_per_example` (language models), `warnings`.

    Raises:
        ConfigError: an option that cannot be, or `output_dir` holds an evaluation with other ones.
        ValueError: target, anchors, data and backbone do not fit each other; the message says how.
    """
    folder = Path(config.output_dir)
    cache_dir = Path(config.cache_dir) if config.cache_dir else folder / "cache"
    name, commit = (None, None) if config.donors else find_backbone(config.backbone)
    opener = EvaluationOpener(json.dumps({**vars(config), "cache_dir": str(cache_dir)}), name, commit)
    comparison = opener.open()
    _check_model(comparison)
    skipped = {arm: reason for arm in config.wanted_arms if (reason := skip_reason(comparison, arm))}
    arms = [arm for arm in config.wanted_arms if arm not in skipped]
    if not arms:
        raise ConfigError(
            f"none of the arms can be run: {'; '.join(f'{arm}: {reason}' for arm, reason in skipped.items())}"
        )
    data, ranked_by = comparison.splits.facts(), comparison.ranked_by
    identity = {
        "data_fingerprint": data["fingerprint"],
        "backbone_weights": None if config.donors else commit or _weights_hash(name),
        "anchor_weights": [donor.facts.get("sha256") for donor in comparison.donors]
        if config.donors
        else [anchor.checkpoint.sha256() for anchor in comparison.plan.anchors],
    }
    run = RunFolder(folder, "an evaluation", records="runs", report=EVALUATION_FILE)
    warnings = _warnings(config, ranked_by, comparison.has_new_head and not config.donors)
    for warning in warnings:
        logger.warning("%s", warning)
    metric = _metric(config)
    workers = config.num_workers if comparison.device.type == "cpu" else 1
    del comparison  # every process opens its own
    settings = {**config.settings(), **identity}
    ours = (cache_dir.name, BACKBONE_SETTINGS)
    with run.open(settings, overwrite=config.overwrite_output_dir, ours=ours):
        outcomes = run_arms(opener, run, arms, config.run_seeds, metric, workers, config.keep_models)
        results = {
            "config": {**vars(config), **config.settings()},
            "identity": identity,
            "seeds": config.run_seeds,
            "versions": {**versions(), **package_versions()},
            "data": data,
            "metric": metric,
            "ranked_by": ranked_by,
            "guess": _guess(data),
            "tokens_per_example": data.get("block_size"),
            "warnings": warnings,
            "arms": outcomes["arms"],
            "skipped": {**skipped, **outcomes["skipped"]},
            "weights": outcomes["weights"],
            "loading": _check_loading(opener.open(), folder) if config.keep_models else {},
        }
        if config.donors:
            results["donors"] = opener.open().donor_scores()
            note_gain(results)
        run.finish(results)
        write_report(results, folder)
    return results


@dataclass(frozen=True)
class EvaluationOpener:
    """Opens the comparison of an evaluation.

    Args:
        settings: an `EvaluateConfig` as JSON, its `cache_dir` set.
        backbone: its folder or Hub id.
        commit: of a Hub id; a branch may move between one process and the next.
    """

    settings: str
    backbone: str | None
    commit: str | None

    def open(self) -> Comparison:
        """Reads the data, matches target and anchors; the backbone's weights are read when they are first needed.

        Raises:
            ValueError: see `evaluate`.
        """
        config = build(EvaluateConfig, ("the evaluation", json.loads(self.settings)))
        if config.donors:
            return _donor_comparison(config)
        name, commit = self.backbone, self.commit
        feature_extractor = WSLFeatureExtractor.from_pretrained(name, revision=commit)
        latent_size = WSLConfig.from_pretrained(name, revision=commit).latent_size
        images = config.task == IMAGE_CLASSIFICATION.name
        splits = load_images(config.data_config) if images else load_text(config.data_config)
        shape = {"num_classes": splits.num_classes, "in_channels": splits.config.channels} if images else {}
        options = {"target_kwargs": config.target_kwargs, **shape}
        plan = plan_generation(
            feature_extractor, config.target, config.anchors, GenerationSettings(), stem=config.stem, **options
        )
        finetuning = config.finetune_config
        comparison = Comparison(
            plan=plan,
            latent_size=latent_size,
            generate=backbone_generator(
                name,
                config.target,
                [config.anchors[index] for index in plan.given],
                finetuning.use_cpu,
                commit,
                stem=config.stem,
                precision=config.precision,
                **options,
            ),
            task=IMAGE_CLASSIFICATION if images else CAUSAL_LANGUAGE_MODELING,
            splits=splits,
            protocol=EvaluationProtocol(
                num_candidates=config.candidates,
                num_kept=config.kept,
                finetune=finetuning if config.protocol == INIT else None,
                bandwidth=config.bandwidth,
                noise=config.noise,
                bootstrap_rounds=config.bootstrap_rounds,
                interpolation_points=config.interpolation_points,
                batch_norm_images=config.batch_norm_images,
            ),
            pca=_pca(config, feature_extractor, latent_size) if "PCA" in config.wanted_arms else None,
            options=finetuning,
        )
        if config.protocol == FEW_SHOT and comparison.has_new_head:
            raise ConfigError(
                f"the anchors have no classifier for the {splits.num_classes} classes of the data, and few-shot "
                "trains none. Give anchors that were trained on this dataset, or take --protocol init"
            )
        return comparison


def _donor_comparison(config: EvaluateConfig) -> DonorComparison:
    images = config.task == IMAGE_CLASSIFICATION.name
    splits = load_images(config.data_config) if images else load_text(config.data_config)
    shape = {"num_classes": splits.num_classes, "in_channels": splits.config.channels} if images else {}
    target, sizes = config.target, {"target_kwargs": config.target_kwargs, **shape}
    if is_builder(target):
        target, sizes = built(target), {}
    comparison = DonorComparison(
        plan=None,
        latent_size=0,
        generate=None,
        task=IMAGE_CLASSIFICATION if images else CAUSAL_LANGUAGE_MODELING,
        splits=splits,
        protocol=EvaluationProtocol(num_candidates=1, num_kept=1, finetune=config.finetune_config),
        options=config.finetune_config,
        own_target=resolve_target(target, **sizes),
        donors=open_donors(config.donors, config.donor_modules),
        num_images=config.num_images,
        distill_epochs=config.distill_epochs,
    )
    comparison.check()
    return comparison


def note_gain(results: dict[str, Any]) -> None:
    """Adds to every arm after how many epochs its mean has reached the end of tuned scratch (None: never)."""
    scratch = results["arms"].get("tuned scratch") or results["arms"].get("scratch")
    if scratch is None:
        return
    sign = -1 if results["metric"] == "loss" else 1
    goal = sign * scratch["summary"]["by_epoch"][-1]["mean"]
    for outcome in results["arms"].values():
        points = outcome["summary"]["by_epoch"]
        outcome["epochs_to_scratch"] = next((p["epoch"] for p in points if sign * p["mean"] >= goal), None)


def _pca(config: EvaluateConfig, feature_extractor: WSLFeatureExtractor, rank: int) -> LinearBaseline | None:
    if not config.tokens:
        return None
    source = DatasetSource(config.tokens)
    theirs = source.feature_extractor()
    for name in EXTRACTOR_SETTINGS:
        if getattr(theirs, name) != getattr(feature_extractor, name):
            raise ConfigError(
                f"option 'tokens': {config.tokens} was tokenized with {name}={getattr(theirs, name)!r:.120}, the "
                f"backbone takes {getattr(feature_extractor, name)!r:.120}. Give the dataset that it was trained on"
            )
    return cached_pca(source, rank, config.pca_tokens, Path(config.cache_dir))


def _weights_hash(backbone: str) -> str | None:
    """None for a folder of settings alone, which is all that the controls need."""
    try:
        return open_checkpoint(backbone).sha256()
    except CheckpointError:
        return None


def _check_loading(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Lets a process that does not know this library load the kept models, and compares their outputs."""
    if comparison.target.library not in ("timm", "transformers"):
        return {}
    modules = {}
    for path in sorted((folder / MODELS).glob("[!.]*")):  # a process that was killed left a hidden one
        with open_checkpoint(path, allow_nonfinite=True) as saved:
            state = {name: saved.read(name) for name in comparison.target.tensors}
        modules[path] = comparison.module(state).cpu()
    if not modules:
        return {}
    batch = default_collate([comparison.splits.validation[index] for index in range(CHECKED_EXAMPLES)])
    return check_loading(modules, batch["input_ids"] if isinstance(batch, dict) else batch[0])


def _check_model(comparison: Comparison) -> None:
    """Lets the target take one example, before hours of work end in its refusal."""
    images = comparison.task is IMAGE_CLASSIFICATION
    classes = comparison.task.num_classes(
        comparison.target.build(0), default_collate([comparison.splits.validation[0]])
    )
    needed = comparison.splits.num_classes if images else comparison.splits.vocab_size
    if classes < needed:
        what = "classes of the data" if images else "tokens of the vocabulary"
        raise ConfigError(
            f"the target {comparison.target.name} tells {classes} classes apart, fewer than the {needed} {what}. Give "
            f"{'another target' if images else 'the tokenizer that its anchors were trained with (--data.tokenizer)'}"
        )


def _metric(config: EvaluateConfig) -> str:
    """The metric of summaries, table and picture."""
    return "accuracy" if config.task == IMAGE_CLASSIFICATION.name else "loss"


def _guess(data: dict[str, Any]) -> float | None:
    """The accuracy of naming the test split's most frequent class."""
    counts = data.get("class_counts", {}).get("test")
    return max(counts) / sum(counts) if counts else None


def _warnings(config: EvaluateConfig, ranked_by: str | None, has_new_head: bool) -> list[str]:
    warnings = []
    count = len(config.run_seeds)
    if config.protocol == INIT and count < ENOUGH_SEEDS:
        warnings.append(f"{count} seed(s) only: nothing tells a difference between arms from chance; take 3 or more.")
    if ranked_by is None and has_new_head:
        warnings.append(
            "The classifier is initialized at random, for the anchor's is of other classes: candidates cannot be "
            "ranked before they are trained, and each seed takes the first draw."
        )
    return warnings
