"""WSLFeatureExtractor: the weights of a model to tokens and back, without loss (paper, section 3.3)."""

import functools
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin

from .checkpoints.checkpoint import Checkpoint, open_checkpoint
from .checkpoints.errors import check_keywords
from .checkpoints.hub import verify
from .configuration_wsl import FROM_FILE
from .loading import FEATURE_EXTRACTOR_NAME, resolve_default
from .remote_code import AUTO_MAP, copy_code_files, without_code_files
from .tokens.layer_normalization import (
    LayerStatistics,
    check_layers,
    check_statistics,
    normalize_layers_,
    restore_layers,
)
from .tokens.layout import read_tokens, write_tokens
from .tokens.manifest import TensorSpec, WeightManifest


Source = Mapping[str, torch.Tensor] | nn.Module | Checkpoint | str | PathLike
OWN_KEYS = ("tokenization", "token_size", "position_unit", "batch_norm_statistics", "layer_normalization")
# What transformers writes into, or puts beside, the options of a feature extractor.
TRANSFORMERS_KEYS = {"auto_map", "custom_pipelines", "dtype", "feature_extractor_type", "name_or_path"}
TRANSFORMERS_KEYS |= {"processor_class", "torch_dtype", "transformers_version"}


class TokenizedWeights(BatchFeature):
    """The output of a feature extractor for a model or a window of it: a `BatchFeature` whose `repr` is one line."""

    def __repr__(self) -> str:
        tokens = self.data.get("tokens")
        shape = None if tokens is None else f"{list(tokens.shape)} {str(tokens.dtype).removeprefix('torch.')}, "
        return f"{type(self).__name__}({shape or ''}{', '.join(self.data)})"


class WSLFeatureExtractor(FeatureExtractionMixin):
    """Turns models into token sequences and token sequences into models.

    Every floating-point weight is tokenized, whatever its name. Integers, batch-norm running statistics and constants
    that the architecture computes (causal masks, rotary tables) are carried beside the tokens (in
    `manifest.carried_values`), tied tensors are stored once, and `decode` gives back the same names, shapes, dtypes
    and bits (of a NaN, admitted by `allow_nonfinite`, only that it is one).

    Args:
        tokenization: "dense" flattens each layer and cuts it into tokens, the last one zero-padded; "sparse" cuts each
            output row (with its bias where shapes allow) on its own, as SANE does (paper, appendix B.2.1).
        token_size: d_t, entries per token: 230 dense, 288 sparse in the paper (Table 4).
        position_unit: the third position k counts "token"s within the layer, or, for sparse tokens, output "row"s:
            the reading that fits the 550 learned positions of the paper's SANE baseline.
        batch_norm_statistics: "carry" leaves running means and variances out of the tokens (paper, appendix B.2.2);
            "tokenize" takes them in.
        layer_normalization: layer name -> [mean, standard deviation] over a zoo: tokens then hold each layer's weights
            in these units (SANE's layer-wise normalization; `hf-wsl tokenize --layer_normalization` fits it), models
            with other layers are refused, and `decode` gives back the weights up to float32 rounding, not their bits.
    """

    model_input_names = ["tokens", "token_mask", "positions"]

    def __init__(
        self,
        tokenization: str = "dense",
        token_size: int = 230,
        position_unit: str = "token",
        batch_norm_statistics: str = "carry",
        layer_normalization: LayerStatistics | None = None,
        **kwargs: Any,
    ):
        self.tokenization = tokenization
        self.token_size = token_size
        self.position_unit = position_unit
        self.batch_norm_statistics = batch_norm_statistics
        self.layer_normalization = None if layer_normalization is None else check_statistics(layer_normalization)
        if not kwargs.pop(FROM_FILE, False):
            not_theirs = [name for name in kwargs if not name.startswith("_") and name not in TRANSFORMERS_KEYS]
            check_keywords(type(self).__name__, not_theirs, OWN_KEYS)
        super().__init__(**kwargs)
        self.layout({})  # an unknown option is refused here, not at the first model

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike, *args: Any, **kwargs: Any
    ) -> "WSLFeatureExtractor":
        """As `FeatureExtractionMixin.from_pretrained`; "default" is that of the backbone of the library."""
        name = resolve_default(pretrained_model_name_or_path)
        verify(name, FEATURE_EXTRACTOR_NAME, kwargs)
        return super().from_pretrained(name, *args, **kwargs)

    @classmethod
    def from_dict(cls, feature_extractor_dict: dict[str, Any], **kwargs: Any) -> "WSLFeatureExtractor":
        """As `FeatureExtractionMixin.from_dict`: takes unknown keys too, for a file may be of another version."""
        return super().from_dict({**feature_extractor_dict, FROM_FILE: True}, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | PathLike) -> "WSLFeatureExtractor":
        """As `FeatureExtractionMixin.from_json_file`, with unknown keys."""
        return cls.from_dict(json.loads(Path(json_file).read_text(encoding="utf-8")))

    def layout(
        self,
        tensors: Mapping[str, TensorSpec],
        tied: Mapping[str, str] | None = None,
        tensor_order: Sequence[str] | None = None,
        constants: Collection[str] = (),
        layouts: Mapping[str, tuple[int, ...]] | None = None,
        stored_as: Mapping[str, str] | None = None,
    ) -> WeightManifest:
        """The manifest of tensors known by name, shape and dtype only (see `WeightManifest.from_tensors`)."""
        return WeightManifest.from_tensors(
            tensors,
            tied,
            tensor_order=tensor_order,
            constants=constants,
            layouts=layouts,
            stored_as=stored_as,
            tokenization=self.tokenization,
            token_size=self.token_size,
            position_unit=self.position_unit,
            batch_norm_statistics=self.batch_norm_statistics,
        )

    def layout_of(self, checkpoint: Checkpoint) -> WeightManifest:
        """The manifest of an open checkpoint, from what is known of its tensors; none is read."""
        facts = checkpoint.tensors, checkpoint.tied, checkpoint.tensor_order, checkpoint.constants, checkpoint.layouts
        return self.layout(*facts, checkpoint.stored_as)

    def manifest(self, source: Source, **options: Any) -> WeightManifest:
        """The manifest of a model; reads its header, none of its weights. Options as in `open_checkpoint`."""
        with open_checkpoint(source, **options) as checkpoint:
            return self.layout_of(checkpoint)

    def __call__(
        self, source: Source | Sequence[Source], return_tensors: str | None = None, **options: Any
    ) -> TokenizedWeights:
        """Tokenizes a whole model, or several.

        Args:
            source: state dict, module, checkpoint file or folder, Hub id (see `open_checkpoint`); or a list of them,
                which makes a batch.
            return_tensors: "pt" makes a batch of one source too, for `model(**fx(source, return_tensors="pt"))`.
            options: passed to `open_checkpoint` (`revision`, `token`, `allow_nonfinite`, `key`, ...).

        Returns:
            tokens `[T, d_t]` float32 (float64 if the model holds any), token_mask `[T, d_t]` bool (true: a weight),
            positions `[T, 3]` int64 and the `WeightManifest`, with the carried tensors in `manifest.carried_values`.
            Of a batch these three alone, `[batch, longest, ...]`, and the attribute `manifests`, a list; tokens beyond
            the end of a model hold no weight: their mask is false.

        Raises:
            CheckpointError: the source cannot be read safely or holds no weights.
            NotTokenizableError: `layer_normalization` is set and lacks a layer of the model.
            NonFiniteWeightsError: a NaN or an infinity among the weights, unless `allow_nonfinite=True`.
            ValueError: an empty list, or another kind of tensors.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors={return_tensors!r}: weights become torch tensors, 'pt'.")
        if isinstance(source, (list, tuple)):
            return self._batch([self(one, **options) for one in source])
        with open_checkpoint(source, **options) as checkpoint:
            manifest = self._manifest_with_values(checkpoint)
            whole = self._window(checkpoint, manifest, 0, manifest.num_tokens)
        return self._batch([whole]) if return_tensors else whole

    def stream(self, source: Source, window_size: int = 4096, **options: Any) -> Iterator[TokenizedWeights]:
        """Tokenizes a model window by window, in the memory of one window.

        Args:
            source, options: as in `__call__`.
            window_size: tokens per window; the last one holds what is left.

        Yields:
            What `__call__` returns, for tokens `[token_start, token_start + window_size)`, and `token_start` too.
            `manifest` is that of the whole model, the same object each time.
        """
        if window_size < 1:
            raise ValueError(f"window_size is {window_size}; a window holds at least one token.")
        with open_checkpoint(source, **options) as checkpoint:
            manifest = self._manifest_with_values(checkpoint)
            for start in range(0, manifest.num_tokens, window_size):
                window = self._window(checkpoint, manifest, start, min(start + window_size, manifest.num_tokens))
                window["token_start"] = start
                yield window

    def decode(
        self,
        tokens: torch.Tensor,
        manifest: WeightManifest,
        carried: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Turns tokens back into the tensors that they came from: the exact inverse of `__call__`.

        With `layer_normalization`, the inverse up to float rounding.

        Args:
            tokens: `[T, d_t]`, any floating-point dtype; what lies in the padding is ignored.
            manifest: what the tokens are made of.
            carried: the tensors that were not tokenized; by default those that the manifest still holds in memory.
                Pass `{}` to leave them out.

        Returns:
            name -> tensor, in state-dict order, on the device of the tokens; tied names share one tensor.

        Raises:
            ValueError: the shape is not the manifest's, carried tensors are neither given nor held, or
                `layer_normalization` lacks a layer.
        """
        expected = (manifest.num_tokens, manifest.token_size)
        if tuple(tokens.shape) != expected:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}, the manifest describes {expected}. "
                "Decode all tokens of a model at once, with the manifest that came with them."
            )
        if carried is None:
            carried = manifest.carried_values
        if carried is None and manifest.carried:
            names = ", ".join(spec.name for spec in manifest.carried[:3])
            raise ValueError(
                f"{len(manifest.carried)} tensors were carried beside the tokens ({names}, ...) and this manifest, "
                "read from JSON, does not hold them. Pass carried={name: tensor}, or carried={} to leave them out."
            )
        if self.layer_normalization is not None:
            check_layers(manifest, self.layer_normalization, "The manifest")
            tokens = restore_layers(tokens, manifest, self.layer_normalization)
        state = {name: tensor.clone() for name, tensor in (carried or {}).items()}
        for block in manifest.blocks:
            state |= write_tokens(tokens[block.first_token : block.end_token], block)
        state |= {alias: state[name] for alias, name in manifest.tied.items()}
        return {name: state[name] for name in manifest.tensor_order if name in state}

    def _batch(self, models: Sequence[TokenizedWeights]) -> TokenizedWeights:
        if not models:
            raise ValueError("The list of sources is empty: a batch holds at least one model.")
        dtype = functools.reduce(torch.promote_types, (model["tokens"].dtype for model in models))
        fields = {name: [model[name] for model in models] for name in self.model_input_names}
        fields["tokens"] = [tokens.to(dtype) for tokens in fields["tokens"]]
        padded = {name: pad_sequence(values, batch_first=True) for name, values in fields.items()}
        batch = TokenizedWeights(padded)
        batch.manifests = [model["manifest"] for model in models]
        return batch

    def _manifest_with_values(self, checkpoint: Checkpoint) -> WeightManifest:
        manifest = self.layout_of(checkpoint)
        if self.layer_normalization is not None:
            check_layers(manifest, self.layer_normalization, checkpoint.source)
        values = {}
        for spec in manifest.carried:
            values[spec.name] = checkpoint.read(spec.name).clone()  # it outlives the memory map that it is read from
            checkpoint.check_finite(spec.name, values[spec.name])
        return replace(manifest, carried_values=values)

    def _window(self, checkpoint: Checkpoint, manifest: WeightManifest, start: int, stop: int) -> TokenizedWeights:
        tokens = torch.empty(stop - start, self.token_size, dtype=manifest.dtype)
        blocks = manifest.blocks_between(start, stop)
        for block in blocks:
            first, last = max(start, block.first_token), min(stop, block.end_token)
            read_tokens(
                tokens[first - start : last - start],
                block,
                first - block.first_token,
                last - block.first_token,
                read=lambda spec, start, stop: checkpoint.read_entries(spec.name, start, stop),
            )
        if not checkpoint.allow_nonfinite and not math.isfinite(tokens.sum()):
            # One sum for all; finite weights alone can overflow it, so only the tensors themselves decide.
            for spec in (spec for block in blocks for spec in block.tensors):
                checkpoint.check_finite(spec.name, checkpoint.read(spec.name))
        if self.layer_normalization is not None:
            normalize_layers_(tokens, manifest, self.layer_normalization, start)
        return TokenizedWeights(
            {
                "tokens": tokens,
                "token_mask": manifest.token_mask(start, stop),
                "positions": manifest.positions(start, stop),
                "manifest": manifest,
            }
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "auto_map": {"AutoFeatureExtractor": AUTO_MAP["AutoFeatureExtractor"]},
        }

    def _get_files_timestamps(self, working_dir: str | PathLike) -> dict[str, float]:
        return without_code_files(super()._get_files_timestamps(working_dir))

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Writes `preprocessor_config.json`, and the code files that let it load without the library installed."""
        copy_code_files(save_directory)
        # As text: to name the repository after it, transformers splits it.
        return super().save_pretrained(fspath(save_directory), push_to_hub=push_to_hub, **kwargs)
