"""The computation of the Space: two models, embedded by their weights on a CPU, and how alike they are.

The backbone is loaded with its own code (`trust_remote_code`), so hf-wsl need not be installed.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, ModelInfo, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file
from transformers import pipeline


HERE = Path(__file__).parent
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
SHARD = re.compile(r"(?:diffusion_pytorch_)?model-\d{5}-of-\d{5}\.safetensors")
UNSHARDED = ("model.safetensors", "adapter_model.safetensors")


class InputError(ValueError):
    """Something that a visitor can put right; the message says what and how."""


@dataclass(frozen=True)
class Settings:
    """Of the Space, by environment variables.

    Attributes:
        backbone: `WSL_BACKBONE`, Hub id or folder; by default the folder `backbone` beside this file.
        revision: `WSL_BACKBONE_REVISION`, commit of the backbone on the Hub.
        max_bytes: `WSL_MAX_BYTES`, of the weights of one model.
    """

    backbone: str
    revision: str | None
    max_bytes: int

    @classmethod
    def from_environment(cls) -> "Settings":
        backbone = os.environ.get("WSL_BACKBONE") or str(HERE / "backbone")
        revision = os.environ.get("WSL_BACKBONE_REVISION") or None
        return cls(backbone, revision, int(os.environ.get("WSL_MAX_BYTES") or 500_000_000))


@dataclass(frozen=True)
class EmbeddedModel:
    """A model's embedding.

    Attributes:
        name: for people.
        embedding: float32 `[latent_size]`.
        per_layer: layer name -> float32 `[latent_size]`.
        num_parameters, num_tokens: of what was embedded.
        said: what its page on the Hub says, e.g. `{"license": "mit"}`.
        tensor_order: names of its tensors in the order of its tokens.
        files: its weights here.
    """

    name: str
    embedding: np.ndarray
    per_layer: Mapping[str, np.ndarray]
    num_parameters: int
    num_tokens: int
    said: Mapping[str, str]
    tensor_order: Sequence[str]
    files: Sequence[str] = ()


@dataclass(frozen=True)
class Layer:
    """A layer that both models have; cosines as in `Comparison`."""

    name: str
    cosine: float | None
    control: float | None


@dataclass(frozen=True)
class Comparison:
    """Two models side by side.

    Attributes:
        cosine: of the embeddings; None where one of them is zero.
        control: the same with the entries of every tensor of the second model shuffled: what is left when only the
            tensors' shapes and statistics are alike.
        layers: those that both have by name, the least alike first.
        only_first, only_second: numbers of layers that the other one does not have.
    """

    cosine: float | None
    control: float | None
    layers: Sequence[Layer]
    only_first: int
    only_second: int


class Embedder:
    """The backbone, loaded once.

    Args:
        settings: of the Space.

    Raises:
        InputError: there is no such backbone, or it cannot be loaded.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.name = settings.backbone if HUB_ID.fullmatch(settings.backbone) else Path(settings.backbone).name
        if not HUB_ID.fullmatch(settings.backbone) and not Path(settings.backbone).is_dir():
            raise InputError(
                "This Space has no backbone yet. Set its variable WSL_BACKBONE to the Hub id of one, or put its files "
                "into a folder `backbone` beside app.py."
            )
        try:
            self.pipeline = pipeline(
                "weight-embedding",
                model=settings.backbone,
                revision=settings.revision,
                trust_remote_code=True,
                device="cpu",
            )
        except Exception as error:  # of transformers, of the Hub's client, of the backbone's own code
            raise InputError(f"The backbone {settings.backbone} cannot be loaded: {first_line(error)}") from error

    def embed(self, hub_id: str, upload: str | None) -> EmbeddedModel:
        """Embeds a model of the Hub or an uploaded file.

        Args:
            hub_id: "org/name" or "org/name@revision", or "".
            upload: path of a safetensors file, or None.

        Raises:
            InputError: neither or both are given, or the model is too large, not to be had, or not readable.
        """
        hub_id = hub_id.strip().removeprefix("https://huggingface.co/").strip("/")
        if bool(hub_id) == bool(upload):
            raise InputError("Give each model either a Hub id or a file.")
        if upload:
            path = check_upload(upload, self.settings.max_bytes)
            return self._embed(path, Path(path).name, files=[path])
        repository, _, revision = hub_id.partition("@")
        info, names = check_repository(repository, revision or None, self.settings.max_bytes)
        embedded = self._embed(repository, repository, revision=info.sha)
        files = [hf_hub_download(repository, name, revision=info.sha) for name in names]  # from the cache by now
        return replace(embedded, said=stated_facts(info), files=files)

    def embed_shuffled(self, model: EmbeddedModel, seed: int = 0) -> EmbeddedModel:
        """Embeds a model with the entries of each of its tensors in a random order.

        Raises:
            InputError: its files cannot be read.
        """
        generator, stored = torch.Generator().manual_seed(seed), {}
        for path in model.files:
            stored |= load_file(path)
        state = {name: stored[name] for name in model.tensor_order if name in stored}
        for name, tensor in state.items():
            if tensor.is_floating_point():
                order = torch.randperm(tensor.numel(), generator=generator)
                state[name] = tensor.flatten()[order].reshape(tensor.shape)
        return self._embed(state, f"{model.name}, shuffled")

    def _embed(self, source: Any, name: str, files: Sequence[str] = (), **options: Any) -> EmbeddedModel:
        try:
            out = self.pipeline(source, progress=False, **options)
        except Exception as error:  # a reader of weights refuses by an error of the backbone's own code
            raise InputError(f"{name} cannot be read: {first_line(error)}") from error
        manifest = out["manifest"]
        return EmbeddedModel(
            name=name,
            embedding=out["embedding"],
            per_layer=out["per_layer"],
            num_parameters=manifest.num_parameters,
            num_tokens=manifest.num_tokens,
            said={},
            tensor_order=manifest.tensor_order,
            files=files,
        )


def check_upload(path: str, max_bytes: int) -> str:
    """The path of an uploaded file that may be read.

    Raises:
        InputError: another format (a pickle could run code), or too large.
    """
    if not path.endswith(".safetensors"):
        raise InputError(f"{Path(path).name}: only .safetensors files are read; pickles can run code.")
    check_size(Path(path).name, os.path.getsize(path), max_bytes)
    return path


def check_repository(repository: str, revision: str | None, max_bytes: int) -> tuple[ModelInfo, list[str]]:
    """The Hub's facts of a model whose weights are small enough, and its weight files; nothing is downloaded.

    Raises:
        InputError: no such model or revision, access on request, no safetensors files, too large.
    """
    if not HUB_ID.fullmatch(repository):
        raise InputError(f"{repository!r} is no Hub id; write org/name, or org/name@revision.")
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except RepositoryNotFoundError as error:
        raise InputError(f"{repository}: there is no such public model on the Hub.") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repository}: it has no revision {revision!r}.") from error
    except Exception as error:  # HTTP errors of two httpx generations, OSError
        raise InputError(f"{repository}: the Hub does not answer ({first_line(error)}). Try again.") from error
    if info.gated:
        raise InputError(f"{repository}: its owner gives access on request, which this Space does not have.")
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    unsharded = [name for name in UNSHARDED if name in sizes][:1]
    names = unsharded or sorted(name for name in sizes if SHARD.fullmatch(name))
    if not names:
        raise InputError(f"{repository}: it has no model.safetensors; other formats are not read here.")
    check_size(repository, sum(sizes[name] for name in names), max_bytes)
    return info, names


def check_size(name: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise InputError(
            f"{name}: {size / 1e6:,.0f} MB of weights; this Space reads up to {max_bytes / 1e6:,.0f} MB. "
            "`hf-wsl embed` on a machine of yours has no limit."
        )


def stated_facts(info: ModelInfo) -> dict[str, str]:
    """License, library, base model and task, as far as the model's page says."""
    card = info.card_data.to_dict() if info.card_data else {}
    facts = {
        "license": card.get("license_name") or card.get("license"),
        "library": info.library_name or card.get("library_name"),
        "task": info.pipeline_tag or card.get("pipeline_tag"),
        "base model": card.get("base_model"),
        "commit": (info.sha or "")[:12],
    }
    return {
        name: ", ".join(value) if isinstance(value, list) else str(value) for name, value in facts.items() if value
    }


def compare(first: EmbeddedModel, second: EmbeddedModel, shuffled: EmbeddedModel) -> Comparison:
    """Cosines of two models, as wholes and layer by layer where both have a layer of that name.

    Args:
        shuffled: the second model by `Embedder.embed_shuffled`.
    """
    shared = [name for name in first.per_layer if name in second.per_layer]
    layers = []
    for name in shared:
        part = first.per_layer[name]
        control = shuffled.per_layer.get(name)
        layers.append(
            Layer(name, cosine(part, second.per_layer[name]), None if control is None else cosine(part, control))
        )
    layers.sort(key=lambda layer: (layer.cosine is not None, layer.cosine))
    return Comparison(
        cosine(first.embedding, second.embedding),
        cosine(first.embedding, shuffled.embedding),
        layers,
        len(first.per_layer) - len(shared),
        len(second.per_layer) - len(shared),
    )


def cosine(first: np.ndarray, second: np.ndarray) -> float | None:
    """Cosine of two vectors `[d]`; None where one is zero."""
    lengths = float(np.linalg.norm(first)) * float(np.linalg.norm(second))
    return float(np.dot(first, second)) / lengths if lengths else None


def first_line(error: BaseException) -> str:
    """The first line of a message; its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
