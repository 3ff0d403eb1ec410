"""One repository of the mixed models: its files with a card, and what becomes of it when it is collected."""

from dataclasses import dataclass, field

import yaml
from hub_state import HubFile


IMAGES, MASKED, GENERATION = "image-classification", "fill-mask", "text-generation"
TRAINING_DATA = {IMAGES: ["imagenet-1k"], MASKED: ["bookcorpus", "wikipedia"], GENERATION: ["openwebtext"]}


@dataclass(frozen=True)
class MixedModel:
    repo_id: str
    files: dict[str, HubFile]
    outcome: str = "accepted"  # a code of datasets_scripts.outcomes
    options: dict = field(default_factory=dict)  # for HubServer.add
    always_fails: bool = False  # the Hub answers 500 to every request for it


def card(
    repo_id: str,
    task: str,
    library: str,
    license: str | None = "apache-2.0",
    base_model: str | None = None,
    relation: str | None = None,
    license_name: str | None = None,
) -> str:
    """A README as people write it: front matter that holds what is known, then some words."""
    data = TRAINING_DATA[task] if base_model is None else ["cifar10"] if task == IMAGES else ["sst2"]
    fields = {
        "library_name": library,
        "license": license,
        "license_name": license_name,
        "pipeline_tag": task,
        "tags": [task, library],
        "datasets": data,
        "base_model": base_model,
        "base_model_relation": relation,
    }
    known = {name: value for name, value in fields.items() if value is not None}
    origin = f"fine-tuned from `{base_model}` on" if base_model else "trained from scratch on"
    return f"---\n{yaml.safe_dump(known, sort_keys=False)}---\n# {repo_id}\n\nA model {origin} {', '.join(data)}.\n"


def mixed_model(
    repo_id: str,
    files: dict[str, bytes],
    task: str = IMAGES,
    outcome: str = "accepted",
    *,
    library: str | None = None,
    options: dict | None = None,
    always_fails: bool = False,
    **card_fields: str | None,
) -> MixedModel:
    if library is None:
        library = "timm" if b'"architecture"' in files.get("config.json", b"") else "transformers"
    contents = {name: data if isinstance(data, HubFile) else HubFile(data) for name, data in files.items()}
    contents["README.md"] = HubFile(card(repo_id, task, library, **card_fields))
    return MixedModel(repo_id, contents, outcome, options or {}, always_fails)
