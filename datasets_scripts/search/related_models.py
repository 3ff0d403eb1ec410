"""Which models are known to be related before their embeddings are compared: they are no strangers to each other."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from hf_wsl.run_folder import SETTINGS_FILE
from modeling_wsl import open_checkpoint
from modeling_wsl.checkpoints.checkpoint import Checkpoint
from modeling_wsl.checkpoints.errors import read_json

from ..model_facts import HubFacts, find_facts
from ..near_copies import NearCopyItem, fingerprint, near_copy_groups
from ..sources import PROPERTIES_FILE, ZOO_MODELS, ModelSource


def open_source(model: ModelSource) -> Checkpoint:
    """The model's weights, at its revision if it is on the Hub."""
    return open_checkpoint(model.location, **({} if model.path else {"revision": model.revision}))


def stated_parents(models: Sequence[ModelSource]) -> dict[str, str]:
    """Child -> parent, model ids, of the models of zoos that were fine-tuned from another one of the models.

    A zoo names a parent by its id in another zoo, whose folder is in the settings; ids repeat from zoo to zoo.
    """
    by_path = {model.path: model.model_id for model in models if model.path is not None}
    parents = {}
    for model in models:
        stated = _properties(model).get("parent")
        settings = model.path.parents[2] / SETTINGS_FILE if stated else None
        if settings is not None and settings.is_file():
            zoo = Path(read_json(settings, SETTINGS_FILE).get("parents") or "").absolute()
            if (parent := by_path.get(zoo / ZOO_MODELS / stated)) is not None:
                parents[model.model_id] = parent
    return parents


def related_groups(models: Sequence[ModelSource]) -> list[int]:
    """Groups models of one owner, checkpoints of one zoo member, parents with children, and copies by weights: near
    ones, and those with permuted neurons.

    Returns:
        for each model the number of its group.

    Raises:
        CheckpointError: a model cannot be read.
    """
    parents = stated_parents(models)
    owners, hashes, items = [], [], []
    for model in models:
        owner = find_facts(model, {}, None, None, HubFacts()).owner
        owners.append(str(model.path.parent) if "member" in _properties(model) else owner or model.model_id)
        with open_source(model) as checkpoint:
            hashes.append(sorted_hash(checkpoint))
            items.append(NearCopyItem(model.model_id, fingerprint(checkpoint), parents.get(model.model_id)))
    first: dict[tuple[int, str], int] = {}
    edges = [
        (i, first.setdefault((kind, label), i))
        for kind, labels in enumerate((owners, hashes, near_copy_groups(items)))
        for i, label in enumerate(labels)
    ]
    i, j = np.array(edges).T
    _, group = connected_components(coo_array((np.ones(len(i)), (i, j)), shape=(len(models),) * 2), directed=False)
    return group.tolist()


def sorted_hash(checkpoint: Checkpoint) -> str:
    """Hash of the names and sorted entries of all tensors: the same for a copy whose neurons are permuted."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        digest.update(name.encode())
        digest.update(checkpoint.read(name).reshape(-1).float().sort().values.numpy().tobytes())
    return digest.hexdigest()


def _properties(model: ModelSource) -> Mapping[str, Any]:
    path = model.path / PROPERTIES_FILE if model.path is not None and model.path.is_dir() else None
    return read_json(path, PROPERTIES_FILE) if path is not None and path.is_file() else {}
