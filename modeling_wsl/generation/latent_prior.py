"""A prior over the latents of a model that has no anchor: what tensors of its kinds, depths and shapes have elsewhere.

The latents of a token are modeled as `features @ coefficients + layer effect + token effect`, by kind of tensor. The
tokens of one layer share much of what they deviate by, above all their scale, and not in a Gaussian way (norms that
start at 0 and at 1): the effect of a layer is that of a layer of the collection, drawn by how near its features are.
Token effects are Gaussian with a full covariance.

Coefficients come from ridge regression towards those of all kinds together, and covariances shrink towards the common
one, so that a rare kind is like the others.

With `token_standardization` the last two latent numbers are a token's mean and log standard deviation. A mean is
modeled as asinh(mean / standard deviation): in units of the token's own scale, and where it is much larger than that
(the scales of norms) by its logarithm.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..backbone.losses import MIN_STD
from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.downloads import fetch
from ..checkpoints.errors import CheckpointError
from ..checkpoints.hub import hub_error
from ..files import replacing
from ..loading import resolve_default
from ..tokens.kinds import FEATURES, KINDS, token_kinds
from ..tokens.manifest import WeightManifest


PRIOR_FILE = "latent_prior.safetensors"
FORMAT = "hf-wsl latent prior 1"
WEIGHTS_FACT = "backbone_weights"  # see `weights_fingerprint`
# How far a layer may be from another to be likely in its place, in units of `FEATURES`.
BANDWIDTHS = (1.0, 0.2, 0.2, 0.1, 0.1, 0.1, 0.3, 0.1, 0.5)
# Of all kinds together, what a kind's own evidence is mixed with.
PRIOR_LAYERS = 4.0
PRIOR_TOKENS = 200.0
MAX_LAYERS = 512  # of a kind, that are kept for their effects


@dataclass(frozen=True, repr=False)
class LatentPrior:
    """See the module's text.

    Attributes:
        coefficients: float32 `[kinds, features, latent_size]`.
        token_factors: float32 `[kinds, latent_size, latent_size]`, F with covariance `F @ F.T`.
        layers: float32 `[layers, features + latent_size]`, means over the tokens of layers of the collection.
        layer_kinds, layer_tokens: int64 `[layers]`, their kinds and how many tokens each mean is over.
        token_standardization: of the backbone.
        facts: what it was fitted on: JSON-serializable.
    """

    coefficients: Tensor
    token_factors: Tensor
    layers: Tensor
    layer_kinds: Tensor
    layer_tokens: Tensor
    token_standardization: bool
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"LatentPrior({len(self.layers):,} layers, {self.latent_size} numbers a token)"

    @property
    def latent_size(self) -> int:
        return self.coefficients.shape[-1]

    @property
    def num_tokens(self) -> int:
        """That it was fitted on."""
        return sum(counted["tokens"] for counted in self.facts["kinds"].values())

    @classmethod
    def fit(
        cls,
        parts: Iterable[tuple[WeightManifest, int, Tensor]],
        token_standardization: bool,
        facts: Mapping[str, Any] | None = None,
    ) -> Self:
        """Fits the prior in the memory of one part and the layers that it touches.

        Args:
            parts: manifest of a model, index of the first token, latents `[n, latent_size]`. Parts of one model follow
                each other, in order, with the same manifest object; not all of its tokens need to be there. Tokens
                whose weights are all equal are left out: they have no scale.
            token_standardization: of the backbone that the latents are from.
            facts: to note.

        Raises:
            ValueError: there is no usable token.
        """
        kinds = [KindMoments() for _ in KINDS]
        open_layers: dict[int, LayerMoments] = {}
        current = None
        for manifest, start, latents in parts:
            described = token_kinds(manifest, start, start + len(latents))
            values = latents.double().cpu()
            usable = values.isfinite().all(-1)
            if token_standardization:
                usable &= values[:, -1].exp() > 2 * MIN_STD
                values = _modeled(values)
            rows = torch.cat([described.features, values], dim=-1)[usable]  # [n, features + latent_size]
            groups = described.groups[usable]
            for group in list(open_layers):
                if manifest is not current or len(groups) == 0 or group // len(KINDS) < int(groups[0]) // len(KINDS):
                    kinds[group % len(KINDS)].add(open_layers.pop(group))
            current = manifest
            for group in groups.unique().tolist():
                open_layers.setdefault(group, LayerMoments()).add(rows[groups == group])
        for group, layer in open_layers.items():
            kinds[group % len(KINDS)].add(layer)
        counted = {
            name: {"tokens": moments.tokens, "layers": moments.layers}
            for name, moments in zip(KINDS, kinds, strict=True)
        }
        if not any(moments.tokens for moments in kinds):
            raise ValueError("The prior needs tokens whose weights are finite and not all equal; there are none.")
        return cls(*solve(kinds), token_standardization, {**(facts or {}), "kinds": counted})

    def sample(self, manifest: WeightManifest, generator: torch.Generator | None = None) -> Tensor:
        """Latents `[T, latent_size]` float32, on the CPU, of a model that is laid out like `manifest`.

        The random numbers are made on the CPU: a seed means the same draw everywhere.
        """
        described = token_kinds(manifest)
        features = described.features.float()
        values = torch.randn(manifest.num_tokens, self.latent_size, generator=generator)
        for group in described.groups.unique().tolist():
            kind, rows = group % len(KINDS), described.groups == group
            chosen = self._draw_layer(kind, features[rows].mean(0), generator)
            layer = self.layers[chosen]
            there, effect = layer[: len(FEATURES)], layer[len(FEATURES) :]
            effect = effect - there @ self.coefficients[self.layer_kinds[chosen]]
            # The mean over few tokens holds its share of their effects already.
            rest = (1 - 1 / self.layer_tokens[chosen]) ** 0.5
            noise = rest * (values[rows] @ self.token_factors[kind].T)
            values[rows] = features[rows] @ self.coefficients[kind] + effect + noise
        return _latents(values) if self.token_standardization else values

    def _draw_layer(self, kind: int, features: Tensor, generator: torch.Generator | None) -> int:
        """The index of a layer of a kind (of any, where the collection has none), likely if its features are near."""
        of_kind = self.layer_kinds == kind
        candidates = (of_kind if of_kind.any() else torch.ones_like(of_kind)).nonzero().squeeze(1)
        distance = (self.layers[candidates, : len(FEATURES)] - features) / torch.tensor(BANDWIDTHS)
        weights = distance.square().sum(-1).mul(-0.5).softmax(0)
        return int(candidates[weights.multinomial(1, generator=generator)])

    def sha256(self) -> str:
        """Of the tensors that draws are made with, as `Checkpoint.sha256`."""
        return open_checkpoint({name: getattr(self, name) for name in _TENSORS}).sha256()

    def check(self, model: PreTrainedModel) -> None:
        """Raises ValueError unless this is a prior over the latents of such a backbone: of these very weights, where
        it was fitted by `fit_and_save_prior`, which notes them."""
        config = model.config
        model.code.check_prior()
        if WEIGHTS_FACT in self.facts and self.facts[WEIGHTS_FACT] != weights_fingerprint(model):
            raise ValueError(
                f"The prior was fitted on latents of other weights than those of {model.name_or_path or 'this one'}. "
                "Fit one in a folder with these weights: hf-wsl prior FOLDER --dataset TOKENS."
            )
        if (config.latent_size, config.token_standardization) != (self.latent_size, self.token_standardization):
            raise ValueError(
                f"The prior is for latents of {self.latent_size} numbers (token_standardization="
                f"{self.token_standardization}), the backbone has {config.latent_size} "
                f"({config.token_standardization}). Fit one in the backbone's folder: hf-wsl prior FOLDER "
                "--dataset TOKENS."
            )

    def save_pretrained(self, folder: str | PathLike) -> Path:
        """Writes `latent_prior.safetensors` into a backbone's folder, whole or not at all; returns its path."""
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        record = {
            "format": FORMAT,
            "kinds": KINDS,
            "features": FEATURES,
            "token_standardization": self.token_standardization,
            "facts": dict(self.facts),
        }
        path = Path(folder) / PRIOR_FILE
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"prior": json.dumps(record)})  # two entries have no order
            temporary.chmod(0o644)  # safetensors leaves files readable by their owner only
        return path

    @classmethod
    def from_pretrained(
        cls, backbone: str | PathLike, *, revision: str | None = None, token: str | bool | None = None
    ) -> Self:
        """Reads the prior that was saved with a backbone.

        Args:
            backbone: folder or Hub id.
            revision: branch, tag or commit on the Hub: that of the backbone itself.
            token: for private and gated backbones.

        Raises:
            CheckpointError: the backbone has none, or the file is damaged.
        """
        backbone = resolve_default(backbone)
        path = Path(backbone) / PRIOR_FILE
        if not Path(backbone).is_dir():
            try:
                path = fetch(str(backbone), PRIOR_FILE, revision=revision, token=token)
            except CheckpointError:
                raise
            except Exception as error:  # of the client, without a common class
                if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):
                    raise hub_error(str(backbone), revision, error) from error
                path = None
        if path is None or not path.is_file():
            raise CheckpointError(
                str(backbone),
                f"has no {PRIOR_FILE}, which models without anchors are drawn from",
                "Give anchors, or fit one in the backbone's folder: hf-wsl prior FOLDER --dataset TOKENS",
            )
        return cls._read(path)

    @classmethod
    def _read(cls, path: Path) -> Self:
        advice = "Fit it again: hf-wsl prior BACKBONE --dataset TOKENS"
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads((file.metadata() or {}).get("prior", "{}"))
                if not isinstance(record, dict) or record.get("format") != FORMAT:
                    raise CheckpointError(str(path), "is no prior that this version of hf-wsl reads", advice)
                tensors = [file.get_tensor(name) for name in _TENSORS]
                standardization, facts = record["token_standardization"], dict(record["facts"])
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(str(path), f"cannot be read ({error!r})", advice) from error
        size, count = tensors[0].shape[-1], len(tensors[2])
        kinds, width = len(KINDS), len(FEATURES)
        shapes = [(kinds, width, size), (kinds, size, size), (count, width + size), (count,), (count,)]
        if (record.get("kinds"), record.get("features")) != (list(KINDS), list(FEATURES)):
            raise CheckpointError(str(path), "is about other kinds or features of tokens than this version's", advice)
        if count == 0 or [tuple(tensor.shape) for tensor in tensors] != shapes:
            raise CheckpointError(str(path), "holds tensors of other shapes than a prior", advice)
        if not 0 <= int(tensors[3].min()) <= int(tensors[3].max()) < kinds:
            raise CheckpointError(str(path), "has layers of kinds that do not exist", advice)
        return cls(*tensors, standardization, facts)


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash of a backbone's weights, rounded to bfloat16: loaded in that type it is still the same one."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


_TENSORS = ("coefficients", "token_factors", "layers", "layer_kinds", "layer_tokens")


def _modeled(latents: Tensor) -> Tensor:
    """Latents with their mean in units of the token's own scale; float64."""
    mean = (latents[:, -2] / latents[:, -1].exp()).asinh()
    return torch.cat([latents[:, :-2], mean[:, None], latents[:, -1:]], dim=-1)


def _latents(values: Tensor) -> Tensor:
    """The inverse of `_modeled`."""
    mean = values[:, -2].sinh() * values[:, -1].exp()
    return torch.cat([values[:, :-2], mean[:, None], values[:, -1:]], dim=-1)


class LayerMoments:
    """Of the tokens of one layer and kind; a row is a token's features and latents side by side."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        """Takes in tokens `[n, features + latents]` float64."""
        self.count += len(rows)
        self.sum = self.sum + rows.sum(0)
        self.second = self.second + rows.T @ rows


class KindMoments:
    """Of a kind of tensor: between layers (each counts once, by its mean) and within them; and some of the layers."""

    def __init__(self) -> None:
        self.tokens = self.layers = 0
        self.between: Tensor | float = 0.0
        self.within: Tensor | float = 0.0
        self.within_mean: Tensor | float = 0.0
        self.kept: list[tuple[Tensor, int]] = []  # mean, tokens
        self._every = 1

    def add(self, layer: LayerMoments) -> None:
        """Takes in a layer, when all its tokens have been added."""
        mean = layer.sum / layer.count
        within = layer.second - layer.count * torch.outer(mean, mean)
        if self.layers % self._every == 0:
            self.kept.append((mean, layer.count))
            if len(self.kept) > MAX_LAYERS:  # every second one, from here on too: they stay spread over all
                self.kept, self._every = self.kept[::2], 2 * self._every
        self.tokens += layer.count
        self.layers += 1
        self.between = self.between + torch.outer(mean, mean)
        self.within = self.within + within
        self.within_mean = self.within_mean + within / layer.count


def solve(kinds: list[KindMoments]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `LatentPrior`, in its order, of the moments of every kind."""
    fitted = [moments for moments in kinds if moments.tokens]
    width = len(FEATURES)
    common = _regress(sum(moments.between + moments.within_mean for moments in fitted), width, None)
    coefficients, sums, degrees = [], [], []
    for moments in kinds:
        own = common
        sums.append(torch.zeros(common.shape[1], common.shape[1]).double())
        degrees.append(moments.tokens - moments.layers)
        if moments.tokens:
            own = _regress(moments.between + moments.within_mean, width, common)
            contrast = torch.cat([-own, torch.eye(own.shape[1]).double()])  # residual = row @ contrast
            sums[-1] = contrast.T @ moments.within @ contrast
        coefficients.append(own)
    shared = sum(sums) / max(sum(degrees), 1)
    covariances = [
        (own + PRIOR_TOKENS * shared) / (count + PRIOR_TOKENS) for own, count in zip(sums, degrees, strict=True)
    ]
    kept = [(mean, kind, count) for kind, moments in enumerate(kinds) for mean, count in moments.kept]
    means, layer_kinds, layer_tokens = zip(*kept, strict=True)
    return (
        torch.stack(coefficients).float(),
        torch.stack([_factor(covariance) for covariance in covariances]),
        torch.stack(means).float(),
        torch.tensor(layer_kinds),
        torch.tensor(layer_tokens),
    )


def _regress(second: Tensor, width: int, towards: Tensor | None) -> Tensor:
    """Ridge regression `[features, latents]` of the latents on the features, towards other coefficients."""
    penalty = 1e-3 if towards is None else PRIOR_LAYERS
    left = second[:width, :width] + penalty * torch.eye(width).double()
    right = second[:width, width:] + (0 if towards is None else penalty * towards)
    return torch.linalg.solve(left, right)


def _factor(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()).float()
