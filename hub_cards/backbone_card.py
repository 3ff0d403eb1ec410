"""The card of a backbone, written from what `hf-wsl pretrain` noted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from datasets_scripts.licenses import OTHER, License, Strictest
from modeling_wsl import WSLConfig
from modeling_wsl.codes.registry import code_of

from .card_text import fill_template, model_card, number, table
from .local_paths import shortened


TAGS = ["hf-wsl", "weight-space-learning", "hyper-representations", "model-weights"]


@dataclass(frozen=True)
class BackboneFacts:
    """What the card of a backbone is made of.

    Attributes:
        repo_id: where it goes.
        training: content of training_facts.json.
        config: of the model.
        extractor: content of preprocessor_config.json.
        license: that it is published under.
        strictest: of the licenses of the training models that are known, or None.
        training_licenses: license -> number of training models, see `origins.training_licenses`.
        dataset_id: the dataset's, if it is on the Hub.
        base_model: Hub id of the backbone that the run started from, if it did and that is on the Hub.
    """

    repo_id: str
    training: Mapping[str, Any]
    config: WSLConfig
    extractor: Mapping[str, Any]
    license: License
    strictest: Strictest | None
    training_licenses: Mapping[str | None, int | None]
    dataset_id: str | None
    base_model: str | None

    @property
    def dataset_name(self) -> str:
        return self.dataset_id or shortened(self.training["config"]["dataset"])

    @property
    def dataset_commit(self) -> str | None:
        """What the dataset was at; before hf-wsl noted the commit, the revision that was asked for."""
        return self.training.get("dataset_commit") or self.training["config"]["dataset_revision"]


def backbone_card(facts: BackboneFacts) -> str:
    """README.md of a backbone.

    Raises:
        KeyError: training_facts.json lacks an entry that every run writes.
    """
    training, config = facts.training, facts.config
    scores = _scores(training)
    dataset = {
        "dataset_type": facts.dataset_id or "tokenized-model-weights",
        "dataset_name": f"{facts.dataset_name}, validation split",
        "dataset_split": "validation",
        "dataset_revision": facts.dataset_commit,
    }
    task = {"task_type": "weight-reconstruction", "task_name": "Reconstruction of the weights of unseen models"}
    results = [
        EvalResult(**task, **dataset, metric_type="r_squared", metric_name=name, metric_value=round(value, 6))
        for name, value in scores.items()
        if value is not None
    ]
    data = ModelCardData(
        model_name=facts.repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
        license=facts.license.identifier,
        license_name=facts.license.stated if facts.license.identifier == OTHER else None,
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=TAGS,
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        base_model=facts.base_model,
    )
    pays = " The lines get each token's mean and deviation for nothing; the backbone pays two of its numbers for them."
    text = fill_template(
        "backbone",
        {
            "name": facts.repo_id.split("/")[-1],
            "repo_id": facts.repo_id,
            "summary": _summary(training, config),
            "token_size": config.token_size,
            "latent_size": config.latent_size,
            "held_out": f"{training['validation_tokens']:,} tokens of the validation split",
            "statistics": pays if config.token_standardization and code_of(config).holds_statistics else "",
            "evaluation": table(("", "R2"), [(name, number(value)) for name, value in scores.items()]),
            "verdict": _verdict(training),
            "training": table(("fact", "value"), _training_rows(facts)),
            "data": _data(facts),
            "data_tokens": _data_tokens(config, facts.extractor),
            "limits": _limits(training),
        },
    )
    return model_card(data, text)


def _summary(training: Mapping[str, Any], config: WSLConfig) -> str:
    size = f"size `{training['size']}`, " if training["size"] else ""
    return (
        f"It has {training['parameters']:,} parameters ({size}width {config.hidden_size}, depth "
        f"{config.num_hidden_layers} on each side), reads windows of {config.window_size} tokens of "
        f"{config.token_size} weights, and {code_of(config).summary}."
    )


def _scores(training: Mapping[str, Any]) -> dict[str, float | None]:
    """Name -> R2, the honest lines first, the weights of this repository last."""
    baselines, history = training["baselines"], training["val_r2_history"]
    names = {
        "random projection": "random projection of the same size (baseline)",
        "PCA": "PCA of the same size (baseline)",
    }
    scores: dict[str, float | None] = {text: baselines.get(name) for name, text in names.items()}
    if history and history[0]["step"] == 0:
        scores["backbone before training (step 0)"] = history[0]["val_r2"]
    if training["best_val_r2_step"] not in (0, training["val_r2_step"]):
        best = f"backbone, best of the run (step {training['best_val_r2_step']:,}; not these weights)"
        scores[best] = training["best_val_r2"]
    at = "" if training["val_r2_step"] is None else f" (step {training['val_r2_step']:,})"
    scores[f"backbone, these weights{at}"] = training["val_r2"]
    return scores


def _verdict(training: Mapping[str, Any]) -> str:
    """In words, what the table says of PCA: no number is read into it."""
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
    dataset = f"`{facts.dataset_name}` (not on the Hub)"
    if facts.dataset_id:
        commit = f" at `{facts.dataset_commit}`" if facts.dataset_commit else ""
        dataset = f"[{facts.dataset_id}](https://huggingface.co/datasets/{facts.dataset_id}){commit}"
    started_from = run["model_name_or_path"]
    seconds = training["seconds"]
    duration = f"{seconds / 60:,.0f} minutes" if seconds >= 120 else f"{seconds:.1f} seconds"
    versions = ", ".join(f"{name} {version}" for name, version in training["versions"].items())
    return [
        ("dataset", dataset),
        ("training tokens", f"{training['train_tokens']:,} in {training['train_windows']:,} windows"),
        ("started from", f"`{shortened(started_from)}`" if started_from else "random weights"),
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
        ("versions", versions),
    ]


def _data(facts: BackboneFacts) -> str:
    if not facts.training_licenses:
        listed = "Which licenses the training models are under was not to be found when this card was written."
    else:
        counts = {license or "not stated": n for license, n in facts.training_licenses.items()}
        if None in counts.values():  # only the dataset's card was there, which counts no models
            listed = f"The models that it was trained on are under these licenses: {', '.join(counts)}."
        else:
            rows = [(license, f"{n:,}") for license, n in counts.items()]
            listed = "The models that it was trained on are under these licenses:\n\n"
            listed += table(("license", "models"), rows)
    kept = "Each stays under its own; the dataset names every model with its source and revision."
    given = f"The backbone is published under `{facts.license.stated}`."
    if facts.strictest is None:
        return f"{listed}\n\n{kept} {given}"
    strictest = f"The strictest known license among the training models is `{facts.strictest.license.stated}`."
    conflicts = "".join(f"\n- {conflict}" for conflict in facts.strictest.conflicts)
    at_odds = f"\n\nLicenses among them that no license of the whole satisfies:\n{conflicts}" if conflicts else ""
    return f"{listed}\n\n{kept} {given} {strictest}{at_odds}"


def _data_tokens(config: WSLConfig, extractor: Mapping[str, Any]) -> str:
    statistics = {"carry": "left out", "tokenize": "taken in"}[extractor["batch_norm_statistics"]]
    layers = extractor.get("layer_normalization")
    normalized = f", weights normalized by the zoo's statistics of each of its {len(layers)} layers" if layers else ""
    return (
        f"{config.tokenization} tokens of {config.token_size} numbers, batch-norm statistics {statistics}, positions "
        f"{config.position_encoding}{normalized}"
    )


def _limits(training: Mapping[str, Any]) -> str:
    if training["steps"] < training["total_steps"]:
        return (
            f"- The run ended after {training['steps']:,} of {training['total_steps']:,} planned steps: its schedule "
            "was not finished."
        )
    return "- One run, one seed: how much the figures vary from run to run is not known."
