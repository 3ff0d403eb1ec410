"""The two pipeline tasks: "weight-embedding" and "weight-generation" (transformers' `pipeline`)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Pipeline, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .backbone.encoding import STREAM_WINDOW, encode_stream
from .backbone.inference import inference_backbone
from .checkpoints.canonical import embedding_view
from .checkpoints.checkpoint import Checkpoint, open_checkpoint
from .checkpoints.errors import CheckpointError, check_keywords, keywords_of
from .embedding.model_embedding import SECTIONS, embed_checkpoint
from .embedding.pooling import POOLINGS, LatentPool
from .feature_extraction_wsl import Source
from .generation.anchors import AnchorSource
from .generation.donors.generation import DONOR_METHODS, DonorSettings, generate_from_donors
from .generation.generate import generate
from .generation.generated_model import GeneratedModel
from .generation.plan import plan_generation
from .generation.settings import GenerationSettings
from .loading import DEFAULT_BACKBONE
from .tokens.manifest import check_choice


logger = logging.get_logger(__name__)
# One source or target, though Python can iterate over it.
ONE_SOURCE = (str, PathLike, Mapping, nn.Module, Checkpoint, PreTrainedConfig)
OPEN_OPTIONS = keywords_of(open_checkpoint)
# Options that have a meaning with donors only.
ONLY_DONORS = {*DonorSettings.__dataclass_fields__, *keywords_of(generate_from_donors)} - {
    *GenerationSettings.__dataclass_fields__,
    *keywords_of(plan_generation),
}
SECTIONS_POOLING = "sections"  # by the weights alone, without the backbone


class WeightPipeline(Pipeline):
    """Base of both tasks: the backbone without its training head, and the feature extractor that belongs to it.

    A list, tuple or column of a dataset gives a list of results; a generator or torch dataset (transformers'
    `KeyDataset`, say) an iterator. What cannot be done there for one source leaves `{"error": message, "index": i}` in
    its place, and the rest is done. A source on its own raises its error.
    """

    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_processor = False
    _load_feature_extractor = None  # optional for transformers; a missing one is refused below, with a better message

    def __init__(self, model: PreTrainedModel, **kwargs: Any):
        super().__init__(model=model.base_model, **kwargs)
        self.model.eval()
        if self.feature_extractor is None:
            raise ValueError(
                "No feature extractor was found beside the backbone. Pass feature_extractor=WSLFeatureExtractor(...) "
                "as the backbone was trained with, or a model folder that holds preprocessor_config.json."
            )
        for name in ("tokenization", "token_size", "position_unit"):
            cuts, expects = getattr(self.feature_extractor, name), getattr(self.model.config, name)
            if cuts != expects:
                raise ValueError(
                    f"The feature extractor has {name}={cuts!r}, the backbone expects {expects!r}. Use the "
                    "preprocessor_config.json that was saved with the backbone."
                )

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **kwargs: Any) -> Any:
        # transformers would collate whole models into a batch; here it means windows of one model.
        if batch_size is None:
            batch_size = self._batch_size
        if batch_size is not None:
            kwargs["windows_per_batch"] = batch_size
        several = isinstance(inputs, Iterable) and not isinstance(inputs, (*ONE_SOURCE, Dataset))
        if several and not hasattr(inputs, "column_names"):  # a table is no source: only one of its columns is many
            if not isinstance(inputs, Sequence):
                inputs = (source for source in inputs)  # the kind of iterator that transformers recognizes
            elif not (inputs := list(inputs)):
                self._sanitize_parameters(**kwargs)  # refuses what it would refuse with a source
                return []
        return super().__call__(inputs, batch_size=1, **kwargs)

    def get_iterator(
        self,
        inputs: Iterable[Any],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Any]:
        """The results of many sources, one after the other; an error becomes an entry, see the class."""
        by_index = isinstance(inputs, Dataset) and hasattr(inputs, "__len__")
        for index, source in enumerate(map(inputs.__getitem__, range(len(inputs))) if by_index else inputs):
            try:
                yield self.run_single(source, preprocess_params, forward_params, postprocess_params)
            except Exception as error:  # whatever it is, the results of the others must not be lost
                logger.warning(f"Source {index} is left out: {error}")
                yield {"error": str(error) or repr(error), "index": index}

    def _check_keywords(self, given: Iterable[str], known: Iterable[str]) -> None:
        shown = set(known) - {"windows_per_batch"} | {"batch_size"}
        check_keywords(f"The pipeline {self.task!r}", [name for name in given if name not in known], shown)


def no_weights(name: str | PathLike) -> CheckpointError:
    """The error of a model without tokens."""
    advice = "Its floating-point tensors are all carried; batch_norm_statistics='tokenize' takes them in"
    return CheckpointError(name, "holds no weights to tokenize", advice)


class WeightEmbedding(dict[str, Any]):
    """The embedding of a model and what it is of: a dict whose `repr` is one line."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={_brief(value)}' for name, value in self.items())})"


def _brief(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return f"{{{len(value)} entries}}" if isinstance(value, Mapping) else repr(value)


class WeightEmbeddingPipeline(WeightPipeline):
    """Embeds models: by the sections of their weights (`ModelEmbedding`), or by the latents of a backbone.

    ```python
    embedder = pipeline("weight-embedding")
    embedder("org/some-model")  # {"embedding": ..., "profile": ..., "position": ..., "probe": ..., "manifest": ...}
    embedder = pipeline("weight-embedding", model="org/hf-wsl-large")
    embedder("org/some-model")  # {"embedding": ..., "per_layer": ..., "manifest": ...}
    ```

    Without a backbone of the caller's the sections are the default: they told neighbors, copies and properties better
    than the features of any backbone so far. `embedding` is float32 numpy `[529]`, profile, position and probe one
    after the other, each under its own name too, and `layers` names the matrices that were looked at.

    With a backbone it is the mean of `WSLModel.token_features`, the paper's latents (appendix B.2.2): `embedding`
    float32 numpy `[latent_size]` (longer with another pooling), `per_layer` {layer name: float32 `[latent_size]`}.
    `manifest` is the model's `WeightManifest`. A list gives a list, with `{"error": ..., "index": ...}` for a source
    that cannot be read; see `WeightPipeline`. A source is what `open_checkpoint` reads: state dict, module, file,
    folder, Hub id. It is read in haloed windows or layer by layer: memory does not grow with its size.

    Args (of the call, or of `pipeline` as defaults):
        pooling: "sections", or of a backbone's latents "mean", "moments" or "layers", see `LatentPool`; default: mean
            where a backbone was named, else sections.
        window_size: tokens per window; default: the window that the backbone was trained on.
        halo: tokens of context on both sides of a window; default 64.
        batch_size: windows per forward pass; default 8.
        precision: "float32", "bfloat16", or "auto", the default: for a backbone stored in bfloat16, on a CPU, the
            faster of the two; others run in the dtype of their weights.
        autocast_dtype: run the backbone under autocast to this type ("bfloat16"), whatever `precision` says.
        progress: show a progress bar; default true.
        revision, token, subfolder, key, order, allow_nonfinite, min_parameters: of the source, see `open_checkpoint`;
            `revision` and `token` of `pipeline` are the backbone's.

    Raises:
        CheckpointError: the source cannot be read safely.
        TypeError: an option that there is not.
    """

    def _sanitize_parameters(
        self,
        *,
        pooling: str | None = None,
        window_size: int | None = None,
        halo: int | None = None,
        windows_per_batch: int | None = None,
        autocast_dtype: torch.dtype | str | None = None,
        precision: str | None = None,
        progress: bool | None = None,
        **open_options: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        self._check_keywords(open_options, (*keywords_of(WeightEmbeddingPipeline._sanitize_parameters), *OPEN_OPTIONS))
        forward = {
            "pooling": pooling,
            "window_size": window_size,
            "halo": halo,
            "batch_size": windows_per_batch,
            "autocast_dtype": autocast_dtype,
            "precision": precision,
            "progress": progress,
        }
        if pooling is not None:
            check_choice("pooling", pooling, (SECTIONS_POOLING, *POOLINGS))
            open_options["pooling"] = pooling
        return open_options, {name: value for name, value in forward.items() if value is not None}, {}

    def preprocess(self, source: Source, pooling: str | None = None, **open_options: Any) -> dict[str, Any]:
        if pooling is None and self.model.name_or_path == DEFAULT_BACKBONE:
            pooling = SECTIONS_POOLING
        if pooling == SECTIONS_POOLING:
            with embedding_view(open_checkpoint(source, **open_options)) as checkpoint:
                sections = embed_checkpoint(checkpoint)
                return {"sections": sections, "manifest": self.feature_extractor.manifest(checkpoint)}
        checkpoint = embedding_view(open_checkpoint(source, **open_options))
        windows = self.feature_extractor.stream(checkpoint, window_size=STREAM_WINDOW)
        first = next(windows, None)
        if first is None:
            raise no_weights(source if isinstance(source, str | PathLike) else f"<{type(source).__name__}>")
        # An iterator, for transformers leaves it alone: it would move the tensors of a list or dict to its device.
        return {"manifest": first["manifest"], "windows": chain([first], windows)}

    def _forward(
        self,
        model_inputs: Mapping[str, Any],
        window_size: int | None = None,
        pooling: str = "mean",
        autocast_dtype: torch.dtype | str | None = None,
        precision: str = "auto",
        **options: Any,
    ) -> dict[str, Any]:
        if "sections" in model_inputs:
            return dict(model_inputs)
        manifest = model_inputs["manifest"]
        model, autocast_dtype = inference_backbone(self.model, autocast_dtype, precision)
        pool = LatentPool(manifest.layers, self.model.config.latent_size, pooling)
        for start, latents in encode_stream(
            model,
            model_inputs["windows"],
            manifest.num_tokens,
            window_size=self.model.config.window_size if window_size is None else window_size,
            autocast_dtype=autocast_dtype,
            **{"progress": True, "features": True, **options},
        ):
            pool.add(latents, manifest.positions(start, start + len(latents))[:, 1])
        return {"pool": pool, "manifest": manifest}

    def postprocess(self, model_outputs: Mapping[str, Any]) -> WeightEmbedding:
        if sections := model_outputs.get("sections"):
            named = {name: getattr(sections, name) for name in SECTIONS}
            embedding = np.concatenate([*named.values()])
            return WeightEmbedding(
                embedding=embedding, **named, layers=sections.layers, manifest=model_outputs["manifest"]
            )
        pool, manifest = model_outputs["pool"], model_outputs["manifest"]
        return WeightEmbedding(
            embedding=pool.embedding(),
            per_layer=pool.per_layer(),
            manifest=replace(manifest, carried_values=None),
        )


class WeightGenerationPipeline(WeightPipeline):
    """Generates models: around anchors of the same architecture (paper, B.2.2), or from donors of other sizes.

    ```python
    generator = pipeline("weight-generation", model="org/hf-wsl-large")
    models = generator("resnet18", anchors=["timm/resnet18.a1_in1k"], num_samples=5, seed=0)
    models[0].instantiate()
    ```

    With a `method` of donors ("fit", "resize", "select"), or with `images`, the anchors may be of any width and depth,
    and no backbone is used: see `generate_from_donors`.

    ```python
    models = pipeline("weight-generation")(my_network, anchors=[resnet20, resnet56], images=unlabeled)
    ```

    Called with a target (see `resolve_target`) it returns a list of `GeneratedModel`; a list of targets gives a list
    of lists, with `{"error": ..., "index": ...}` for a target that cannot be generated; see `WeightPipeline`. Target
    and anchors are checked against each other before any work is done.

    Args (of the call, or of `pipeline` as defaults):
        anchors: one or more trained models.
        num_classes, in_channels, target_kwargs: see `resolve_target`.
        target_revision: branch, tag or commit, where the target is a Hub id.
        initialize: modules or tensors of the target to initialize anew instead of sampling them.
        stem: "adapt" or "initialize", where an anchor takes images of other channels; see `match_anchors`.
        settings: `GenerationSettings`, such as `GenerationSettings.few_shot(rank=...)`; the next outrank it.
        method, num_samples, num_candidates, seed, bandwidth, noise, interpolation_ends, bootstrap_rounds, window_size,
            halo, batch_size, autocast_dtype, precision, batch_norm_images, rank, progress: see `GenerationSettings`.
        images, labels, distill_epochs: of donors, as are `method`, `initialize`, `seed`, `rank`, `num_samples` and
            `progress`: see `DonorSettings`.
        anchor_modules: see `generate_from_donors`.
        revision, token, subfolder, key, order, allow_nonfinite, min_parameters: of the anchors, see `open_checkpoint`;
            the token opens the target too. `revision` and `token` of `pipeline` are the backbone's.

    Raises:
        ValueError: the target is unknown, or an anchor does not match it; the message names the tensors.
        CheckpointError: an anchor cannot be read safely.
        TypeError: an option that there is not.
    """

    def _sanitize_parameters(
        self, windows_per_batch: int | None = None, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        self._check_keywords(
            options,
            (
                *keywords_of(WeightGenerationPipeline.preprocess),
                *GenerationSettings.__dataclass_fields__,
                *keywords_of(plan_generation),
                *DonorSettings.__dataclass_fields__,
                *keywords_of(generate_from_donors),
                *OPEN_OPTIONS,
            ),
        )
        if windows_per_batch is not None:
            options["batch_size"] = windows_per_batch
        return options, {}, {}

    def preprocess(
        self,
        target: Any,
        *,
        anchors: AnchorSource | Sequence[AnchorSource] = (),
        settings: GenerationSettings | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        if options.get("images") is not None or options.get("method") in DONOR_METHODS:
            return {"donors": (target, anchors, *_donor_options(settings, options))}
        if useless := sorted(ONLY_DONORS & options.keys()):
            raise TypeError(
                f"{', '.join(useless)}: of donors, which `images` or a method of {', '.join(DONOR_METHODS)} asks for."
            )
        given = {name: options.pop(name) for name in GenerationSettings.__dataclass_fields__ if name in options}
        settings = GenerationSettings(**given) if settings is None else replace(settings, **given)
        plan = plan_generation(self.feature_extractor, target, anchors, settings, **options)
        return {"plan": plan}

    def _forward(self, model_inputs: Mapping[str, Any]) -> list[GeneratedModel]:
        if "donors" in model_inputs:
            target, anchors, settings, options = model_inputs["donors"]
            return generate_from_donors(target, anchors, settings, **options)
        return generate(self.model, model_inputs["plan"])

    def postprocess(self, model_outputs: Iterable[GeneratedModel]) -> list[GeneratedModel]:
        return list(model_outputs)


def _donor_options(
    settings: GenerationSettings | None, options: dict[str, Any]
) -> tuple[DonorSettings, dict[str, Any]]:
    """The settings and the other options of a generation from donors.

    Raises:
        TypeError: an option is of draws around anchors only.
    """
    known = {*DonorSettings.__dataclass_fields__, *keywords_of(generate_from_donors), *OPEN_OPTIONS}
    if useless := sorted(options.keys() - known) or (["settings"] if settings is not None else []):
        raise TypeError(f"{', '.join(useless)}: of draws around anchors of the same architecture, not of donors.")
    given = {name: options.pop(name) for name in DonorSettings.__dataclass_fields__ if name in options}
    return DonorSettings(**given), options
