"""What the tests' Hub says of a repository: card, config, tags and parameters, read from its files."""

import json
import re
import struct
from collections import Counter
from typing import Any

import yaml
from hub_state import Commit, HubFile, Repository


FRONT_MATTER = re.compile(rb"---\r?\n(.*?)\r?\n---", re.DOTALL)
CONFIG_FIELDS = ("architectures", "model_type", "auto_map", "quantization_config")
FORMATS = {"safetensors": ".safetensors", "pytorch": (".bin", ".pt", ".pth"), "onnx": ".onnx", "keras": ".h5"}
SHARD = re.compile(r"(model|adapter_model|model-\d{5}-of-\d{5})\.safetensors")
TASKS = {  # what production takes for the task where the card does not say it
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
}
LARGEST_HEADER = 25 * 1024**2  # bytes
LIST_FIELDS = ("likes", "private", "downloads", "tags", "pipeline_tag", "library_name", "createdAt", "trendingScore")
FULL_FIELDS = (*LIST_FIELDS, "author", "gated", "disabled", "lastModified", "sha", "siblings")
INFO_FIELDS = (*FULL_FIELDS, "cardData", "config", "safetensors", "transformersInfo", "usedStorage", "spaces", "sdk")


def facts_of(repository: Repository, commit: Commit) -> dict[str, Any]:
    """Every field that the API knows of a repository at a commit, but for the sizes of its files."""
    card = read_card(commit.files.get("README.md"))
    config = read_config(commit.files)
    library = card.get("library_name") or guess_library(commit.files, config)
    task = card.get("pipeline_tag") or guess_task(card, config)
    tags = tags_of(repository, card | {"pipeline_tag": task}, config, library, commit.files)
    facts = {
        "id": repository.repo_id,
        "modelId": repository.repo_id,
        "author": repository.owner,
        "sha": commit.id,
        "createdAt": repository.created,
        "lastModified": commit.date,
        "private": repository.private,
        "gated": repository.gated,
        "disabled": repository.disabled,
        "downloads": repository.downloads,
        "likes": repository.likes,
        "trendingScore": 0,
        "tags": tags,
        "siblings": [{"rfilename": name} for name in sorted(commit.files)],
        "cardData": card or None,
        "usedStorage": sum(file.size for file in commit.files.values()),
        "spaces": [],
    }
    if repository.repo_type == "model":
        facts |= {"library_name": library, "pipeline_tag": task, "config": config}
        if parameters := count_parameters(commit.files):
            facts["safetensors"] = {"parameters": parameters, "total": sum(parameters.values())}
        if library == "transformers" and config.get("architectures"):
            facts["transformersInfo"] = {"auto_model": "AutoModel"}
    else:
        del facts["modelId"]
        facts["sdk"] = card.get("sdk")
    return {name: value for name, value in (facts | repository.info).items() if value is not None}


def with_fields(facts: dict[str, Any], names: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """The facts that were asked for; the id always comes."""
    return {name: facts[name] for name in ("id", "modelId", *names) if name in facts}


def siblings_with_blobs(commit: Commit) -> list[dict[str, Any]]:
    rows = []
    for name, file in sorted(commit.files.items()):
        row = {"rfilename": name, "size": file.size, "blobId": file.blob_id(name)}
        if file.is_lfs(name):
            row["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
        rows.append(row)
    return rows


def read_card(readme: HubFile | None) -> dict[str, Any]:
    """The front matter of a README; nothing where there is none or it is broken."""
    match = FRONT_MATTER.match(readme.read()) if readme else None
    try:
        card = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}


def read_object(file: HubFile | None) -> dict[str, Any]:
    """A JSON object; nothing where there is none or it is broken."""
    try:
        value = json.loads(file.read()) if file else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def read_config(files: dict[str, HubFile]) -> dict[str, Any]:
    config = read_object(files.get("config.json"))
    known = {name: config[name] for name in CONFIG_FIELDS if name in config}
    if adapter := read_object(files.get("adapter_config.json")):
        known["peft"] = {name: adapter[name] for name in ("base_model_name_or_path", "task_type") if adapter.get(name)}
    return known


def guess_library(files: dict[str, HubFile], config: dict[str, Any]) -> str | None:
    if "adapter_config.json" in files:
        return "peft"
    return "transformers" if config.get("model_type") else None


def guess_task(card: dict[str, Any], config: dict[str, Any]) -> str | None:
    for tag in as_list(card.get("tags")):
        if tag in TASKS.values():
            return tag
    for architecture in as_list(config.get("architectures")):
        for suffix, task in TASKS.items():
            if architecture.endswith(suffix):
                return task
    return None


def as_list(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def tags_of(
    repository: Repository,
    card: dict[str, Any],
    config: dict[str, Any],
    library: str | None,
    files: dict[str, HubFile],
) -> list[str]:
    if repository.repo_type == "model":
        formats = [name for name, suffix in FORMATS.items() if any(file.lower().endswith(suffix) for file in files)]
        tags = [*as_list(library), *formats, *as_list(config.get("model_type")), *as_list(card.get("pipeline_tag"))]
        tags += as_list(card.get("tags")) + as_list(card.get("language"))
        tags += [f"dataset:{name}" for name in as_list(card.get("datasets"))]
        relation = card.get("base_model_relation") or ("adapter" if library == "peft" else "finetune")
        for base in as_list(card.get("base_model")):
            tags += [f"base_model:{base}", f"base_model:{relation}:{base}"]
        tags += ["custom_code"] if config.get("auto_map") else []
    else:
        tags = [
            f"{name}:{value}"
            for name in ("task_categories", "language", "size_categories")
            for value in as_list(card.get(name))
        ] + as_list(card.get("tags"))
    tags += [f"license:{name}" for name in as_list(card.get("license"))] + ["region:us", *repository.labels]
    return list(dict.fromkeys(tags))


def count_parameters(files: dict[str, HubFile]) -> dict[str, int]:
    """Parameters by dtype, added up from the headers of the safetensors files; nothing where a header is damaged."""
    counts: Counter[str] = Counter()
    for name, file in files.items():
        if not SHARD.fullmatch(name):
            continue
        try:
            size = struct.unpack("<Q", file.read(0, 8))[0]
            if size > LARGEST_HEADER:
                return {}
            header = json.loads(file.read(8, size))
            for tensor, entry in header.items():
                if tensor != "__metadata__":
                    number = 1
                    for dimension in entry["shape"]:
                        number *= dimension
                    counts[entry["dtype"]] += number
        except (struct.error, ValueError, TypeError, KeyError, AttributeError):
            return {}
    return dict(counts)
