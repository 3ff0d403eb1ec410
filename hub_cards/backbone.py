"""A backbone for the Hub: the finished model of a run of `hf-wsl pretrain`, without checkpoints and optimizer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from transformers import AutoModelForPreTraining
from transformers.dynamic_module_utils import get_relative_import_files

from hf_wsl.files import write_json
from hf_wsl.tables import code, markdown_table, plain
from modeling_wsl import WSLConfig
from modeling_wsl.checkpoints.checkpoint import open_checkpoint
from modeling_wsl.codes.registry import code_of

from .cards import fill_card, shortened, without_local_paths
from .errors import PublishError
from .origins import hub_id, license_fields, settle_license, training_licenses
from .publication import STAGING, Publication, model_publication, read_facts, refuse_leftovers, weight_files


CONFIG_FILE, EXTRACTOR_FILE, FACTS_FILE = "config.json", "preprocessor_config.json", "training_facts.json"
OWNED = (
    "*.py",
    "model*.safetensors",
    "model.safetensors.index.json",
    CONFIG_FILE,
    EXTRACTOR_FILE,
    FACTS_FILE,
)
NEEDED_FACTS = ("status", "parameters", "steps", "total_steps", "val_r2", "val_r2_history", "baselines", "config")
TAGS = ["hf-wsl", "weight-space-learning", "hyper-representations", "model-weights"]


def prepare_backbone(folder: Path, repo_id: str, license: str | None, on_hub: str | None) -> Publication:
    """Checks the folder of a backbone and writes its card.

    Args:
        folder: output_dir of `hf-wsl pretrain`.
        repo_id: where it goes.
        license: to publish under; None: the one that all training models share.
        on_hub: README.md of the repository, None where it has none.

    Raises:
        PublishError: the run has not ended, a file is missing or damaged, no license follows.
    """
    refuse_leftovers(folder, (".partial-*", ".outdated-*"), "Finish it: --resume_from_checkpoint latest.")
    if not (folder / FACTS_FILE).is_file():
        raise PublishError(
            f"{folder} holds a backbone and no {FACTS_FILE}, which its card is written from. Give the output_dir of a "
            "finished `hf-wsl pretrain`; a model saved by hand goes up by its own push_to_hub."
        )
    training = read_facts(folder / FACTS_FILE, NEEDED_FACTS)
    if training["status"] == "interrupted":
        raise PublishError(
            f"{folder}: the run was interrupted at step {training['steps']}. Finish it with "
            "--resume_from_checkpoint latest."
        )
    extractor = read_facts(folder / EXTRACTOR_FILE, ("token_size", "batch_norm_statistics"))
    weights, config, python = weight_files(folder), check_model(folder), code_files(folder)
    run = training["config"]
    licenses = training_licenses(run["dataset"], training.get("dataset_commit") or run["dataset_revision"])
    facts = BackboneFacts(
        repo_id,
        training,
        config,
        extractor,
        # A backbone holds no model's weights, so the publisher's word outranks the licenses of the training models.
        settle_license(license, licenses, "the models it was trained on"),
        licenses,
        dataset_id=hub_id(run["dataset"], "dataset"),
        base_model=hub_id(run["model_name_or_path"], "model"),
    )
    staged = folder / STAGING / FACTS_FILE
    write_json(staged, without_local_paths(json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))))
    return model_publication(
        folder,
        "backbone",
        [*python, *weights, CONFIG_FILE, EXTRACTOR_FILE],
        {FACTS_FILE: staged},
        OWNED,
        facts.license,
        backbone_card(facts),
        on_hub,
    )


def code_files(folder: Path) -> list[str]:
    """The code in the folder that others need to load the model without hf-wsl: all that its `auto_map` reaches.

    Raises:
        PublishError: a file of it is missing.
    """
    auto_map = read_facts(folder / CONFIG_FILE, ()).get("auto_map") or {}
    start = folder / f"{auto_map.get('AutoConfig', 'wsl.WSLConfig').rpartition('--')[2].partition('.')[0]}.py"
    try:
        reached = [Path(path).name for path in get_relative_import_files(start)]
    except OSError as error:
        raise PublishError(
            f"{folder} lacks code that others need to load it without hf-wsl ({error.filename}). Load it and save it "
            "again: AutoModelForPreTraining.from_pretrained(folder).save_pretrained(folder)."
        ) from error
    return sorted({start.name, *reached})


def check_model(folder: Path) -> WSLConfig:
    """Compares the weights with what config.json describes, by names and shapes.

    Raises:
        PublishError: a tensor is missing, superfluous or of another shape.
    """
    try:
        config = WSLConfig.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise PublishError(f"{folder}: config.json is none of a backbone ({' '.join(str(error).split())}).") from error
    with torch.device("meta"):
        model = AutoModelForPreTraining.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with open_checkpoint(folder) as checkpoint:
        stored = {name: tuple(spec.shape) for name, spec in checkpoint.tensors.items()}
    for name in sorted(expected.keys() | stored.keys()):
        if expected.get(name) != stored.get(name):
            raise PublishError(
                f"{folder}: tensor {name} is {stored.get(name, 'missing')} in the weights and "
                f"{expected.get(name, 'unknown')} by config.json. Save the model again."
            )
    return config


@dataclass(frozen=True)
class BackboneFacts:
    """The facts that the card of a backbone is made of.

    Attributes:
        repo_id: where it goes.
        training: content of training_facts.json.
        config: of the model.
        extractor: content of preprocessor_config.json.
        license: that it is published under, see `origins.settle_license`.
        training_licenses: license -> number of training models, see `origins.training_licenses`.
        dataset_id: the dataset's, if it is on the Hub.
        base_model: Hub id of the backbone that the run started from, if it did and that is on the Hub.
    """

    repo_id: str
    training: Mapping[str, Any]
    config: WSLConfig
    extractor: Mapping[str, Any]
    license: str
    training_licenses: Mapping[str | None, int | None]
    dataset_id: str | None
    base_model: str | None

    @property
    def dataset_name(self) -> str:
        return self.dataset_id or shortened(self.training["config"]["dataset"])

    @property
    def dataset_commit(self) -> str | None:
        """The commit of the dataset; before hf-wsl noted it, the revision that was asked for."""
        return self.training.get("dataset_commit") or self.training["config"]["dataset_revision"]


def backbone_card(facts: BackboneFacts) -> str:
    """README.md of a backbone.

    Raises:
        KeyError: training_facts.json lacks an entry that every run writes.
    """
    training = facts.training
    scores = _scores(training)
    measured = {name: value for name, value in scores.items() if value is not None}
    task = {
        "task_type": "weight-reconstruction",
        "task_name": "Reconstruction of the weights of unseen models",
        "dataset_type": facts.dataset_id or "tokenized-model-weights",
        "dataset_name": f"{facts.dataset_name}, validation split",
        "dataset_split": "validation",
        "dataset_revision": facts.dataset_commit,
        "metric_type": "r_squared",
    }
    results = [EvalResult(**task, metric_name=name, metric_value=round(v, 6)) for name, v in measured.items()]
    name = facts.repo_id.split("/")[-1]
    data = ModelCardData(
        model_name=name if results else None,
        eval_results=results or None,
        **license_fields(facts.license),
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=TAGS,
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        base_model=facts.base_model,
    )
    counts = {license or "not stated": n for license, n in facts.training_licenses.items()}
    counted = None not in counts.values()  # else only the dataset's card was there, which counts no models
    return fill_card(
        "backbone",
        data,
        name=name,
        repo_id=facts.repo_id,
        training=training,
        config=facts.config,
        code=code_of(facts.config),
        evaluation=markdown_table(
            ("", "R2"),
            [(name, "not measured" if value is None else f"{value:.3f}") for name, value in scores.items()],
        ),
        verdict=_verdict(training),
        facts=markdown_table(("fact", "value"), _training_rows(facts), text_columns=2),
        licenses=(
            markdown_table(("license", "models"), [(plain(license), f"{n:,}") for license, n in counts.items()])
            if counts and counted
            else ""
        ),
        license_names=", ".join(map(plain, counts)),
        publisher_license=code(facts.license),
        statistics={"carry": "left out", "tokenize": "taken in"}[facts.extractor["batch_norm_statistics"]],
        normalized_layers=len(facts.extractor.get("layer_normalization") or ()),
    )


def _scores(training: Mapping[str, Any]) -> dict[str, float | None]:
    """Name -> R2, the honest lines first, the weights of this repository last."""
    baselines, history = training["baselines"], training["val_r2_history"]
    scores: dict[str, float | None] = {
        f"{name} of the same size (baseline)": baselines.get(name) for name in ("random projection", "PCA")
    }
    if history and history[0]["step"] == 0:
        scores["backbone before training (step 0)"] = history[0]["val_r2"]
    if training["best_val_r2_step"] not in (0, training["val_r2_step"]):
        best = f"backbone, best of the run (step {training['best_val_r2_step']:,}; not these weights)"
        scores[best] = training["best_val_r2"]
    at = "" if training["val_r2_step"] is None else f" (step {training['val_r2_step']:,})"
    scores[f"backbone, these weights{at}"] = training["val_r2"]
    return scores


def _verdict(training: Mapping[str, Any]) -> str:
    """The comparison with PCA in words: no number is read into it."""
    value, pca = training["val_r2"], training["baselines"].get("PCA")
    if value is None:
        return "The run had no validation split: nothing is known of how it does on unseen models."
    if pca is None:
        return "PCA was not fitted in this run, so nothing says whether the backbone is worth its size."
    difference = value - pca
    if abs(difference) < 0.0005:
        return "On unseen models it does as well as PCA of the same size, and no better."
    if difference > 0:
        return f"On unseen models it is {difference:.3f} above PCA of the same size."
    return f"On unseen models it is {-difference:.3f} below PCA of the same size: **it does not beat PCA.**"


def _training_rows(facts: BackboneFacts) -> list[tuple[str, str]]:
    training, run = facts.training, facts.training["config"]
    dataset = f"{code(facts.dataset_name)} (not on the Hub)"
    if facts.dataset_id:
        commit = f" at {code(facts.dataset_commit)}" if facts.dataset_commit else ""
        dataset = f"[{facts.dataset_id}](https://huggingface.co/datasets/{facts.dataset_id}){commit}"
    started_from, seconds = run["model_name_or_path"], training["seconds"]
    duration = f"{seconds / 60:,.0f} minutes" if seconds >= 120 else f"{seconds:.1f} seconds"
    return [
        ("dataset", dataset),
        ("training tokens", f"{training['train_tokens']:,} in {training['train_windows']:,} windows"),
        ("started from", code(shortened(started_from)) if started_from else "random weights"),
        ("steps", f"{training['steps']:,} of {training['total_steps']:,} ({training['status']})"),
        ("windows a step", f"{training['windows_per_step']:,}"),
        ("tokens seen", f"{training['tokens_seen']:,}"),
        ("time", f"{duration} on {training['processes']} x {training['device']}"),
        ("learning rate", f"{run['learning_rate']:g} ({run['lr_scheduler_type']})"),
        ("weight decay", f"{run['weight_decay']:g}"),
        ("loss normalization", facts.config.loss_normalization),
        ("contrastive weight, noise", f"{facts.config.contrastive_weight:g}, {facts.config.noise_std:g}"),
        ("arithmetic", f"{run['precision']} forward pass, saved as {run['save_dtype']}"),
        ("seed", str(training["seed"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in training["versions"].items())),
    ]
