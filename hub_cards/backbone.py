"""A backbone for the Hub: the finished model of a run of `hf-wsl pretrain`, without checkpoints and optimizer."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForPreTraining
from transformers.dynamic_module_utils import get_relative_import_files

from hf_wsl.files import write_json
from modeling_wsl import WSLConfig
from modeling_wsl.checkpoints.checkpoint import open_checkpoint
from modeling_wsl.generation.latent_prior import PRIOR_FILE

from .backbone_card import BackboneFacts, backbone_card
from .card_text import CARD_FILE
from .errors import PublishError
from .local_paths import without_local_paths
from .origins import hub_id, settle_license, training_licenses
from .publication import (
    STAGING,
    Publication,
    left_behind,
    read_facts,
    refuse_leftovers,
    stage_card,
    text_files,
    weight_files,
)


CONFIG_FILE, EXTRACTOR_FILE, FACTS_FILE = "config.json", "preprocessor_config.json", "training_facts.json"
CODE_START = "configuration_wsl.py"
OWNED = (
    "*.py",
    "model*.safetensors",
    "model.safetensors.index.json",
    PRIOR_FILE,
    CONFIG_FILE,
    EXTRACTOR_FILE,
    FACTS_FILE,
)
NEEDED_FACTS = ("status", "parameters", "steps", "total_steps", "val_r2", "val_r2_history", "baselines", "config")


def prepare_backbone(folder: Path, repo_id: str, license: str | None, on_hub: str | None) -> Publication:
    """Checks the folder of a backbone and writes its card.

    Args:
        folder: output_dir of `hf-wsl pretrain`.
        repo_id: where it goes.
        license: to publish under; None: the strictest of the training models'.
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
    weights = weight_files(folder)
    config = check_model(folder)
    code = code_files(folder)
    run = training["config"]
    licenses = training_licenses(run["dataset"], training.get("dataset_commit") or run["dataset_revision"])
    settled, known = settle_license(license, list(licenses), "the models it was trained on", adapted=False)
    dataset_id, base_model = hub_id(run["dataset"], "dataset"), hub_id(run["model_name_or_path"], "model")
    facts = BackboneFacts(
        repo_id, training, config, extractor, settled, known, licenses, dataset_id=dataset_id, base_model=base_model
    )
    readme, card, notes = stage_card(folder, backbone_card(facts), on_hub)
    staged_facts = folder / STAGING / FACTS_FILE
    write_json(staged_facts, without_local_paths(json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))))
    if known and settled.rank < known.license.rank:
        notes.append(
            f"{settled.stated} grants more than {known.license.stated}, the strictest license of the training models."
        )
    notes += known.conflicts if known else ()
    prior = [PRIOR_FILE] if (folder / PRIOR_FILE).is_file() else []
    here = [*text_files(folder), *code, *weights, *prior, CONFIG_FILE, EXTRACTOR_FILE]
    files = {name: folder / name for name in here} | {FACTS_FILE: staged_facts, CARD_FILE: readme}
    return Publication(
        folder=folder,
        kind="backbone",
        repo_type="model",
        files=files,
        owned=OWNED,
        license=settled.stated,
        left=left_behind(folder, files),
        notes=tuple(notes),
        card=card,
    )


def code_files(folder: Path) -> list[str]:
    """The code in the folder that others need to load the model without hf-wsl: all that its configuration reaches.

    Raises:
        PublishError: a file of it is missing.
    """
    start = folder / CODE_START
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
        expected = {
            name: tuple(t.shape) for name, t in AutoModelForPreTraining.from_config(config).state_dict().items()
        }
    with open_checkpoint(folder) as checkpoint:
        found = {name: tuple(spec.shape) for name, spec in checkpoint.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise PublishError(
                f"{folder}: tensor {name} is {found.get(name, 'missing')} in the weights and "
                f"{expected.get(name, 'unknown')} by config.json. Save the model again."
            )
    return config
