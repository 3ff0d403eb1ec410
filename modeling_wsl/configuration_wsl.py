"""WSLConfig: the backbone's hyper-parameters and the sizes of the paper (arXiv 2510.02096, Table 4)."""

import os
from dataclasses import field, fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from .checkpoints.errors import check_keywords
from .codes.registry import code_of
from .loading import MODEL_TYPE, resolve_default
from .remote_code import AUTO_MAP, CUSTOM_PIPELINES, copy_code_files, is_remote_code, without_code_files


# A head that flattens the window is part of the published parameter counts of the three paper sizes. `nano` and `tiny`
# are ours: each token standardized, and a linear path that starts at PCA.
SIZES: dict[str, dict[str, Any]] = {
    "nano": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "window_size": 256,
        "loss_normalization": "token",
        "denoise": True,
        "token_standardization": True,
        "linear_path": True,
    },
    "tiny": {
        "hidden_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "window_size": 512,
        "loss_normalization": "token",
        "denoise": True,
        "token_standardization": True,
        "linear_path": True,
    },
    "hf-small": {
        "hidden_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "window_size": 512,
        "projection": "flat",
    },
    "hf-large": {
        "hidden_size": 1536,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "window_size": 512,
        "projection": "flat",
    },
    "sane": {
        "hidden_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "token_size": 288,
        "window_size": 256,
        "tokenization": "sparse",
        "position_unit": "row",
        "position_encoding": "learned",
        "projection": "flat",
    },
}


MAX_LAYERS = 1000  # what a file asks for beyond is no backbone, and would be built for hours
# Marks what comes from a file, which may be of an older or newer version: its keys are all taken.
FROM_FILE = "_from_file"
# Of transformers: keys that no attribute of its class of configurations shows.
TRANSFORMERS_KEYS = {"attn_implementation", "auto_map", "custom_pipelines", "experts_implementation"}
TRANSFORMERS_KEYS |= {"per_layer_config", "quantization_config", "task_specific_params", "tie_word_embeddings"}


@strict
class WSLConfig(PreTrainedConfig):
    """Hyper-parameters of `WSLModel` and `WSLForPreTraining`; keyword arguments only, types are checked.

    Args:
        token_size: weights in one token, d_t.
        window_size: tokens in one training window. Only the "flat" projection head depends on it.
        hidden_size: width d of both transformers.
        num_hidden_layers: blocks of the encoder, and again as many of the decoder.
        num_attention_heads: heads; must divide `hidden_size`.
        intermediate_size: width of the MLP, 4 x `hidden_size` when not given.
        latent_size: numbers that are left of each token between encoder and decoder.
        position_encoding: "sinusoidal" (no parameters, any position) or "learned" (tables of `max_positions`).
        max_positions: sizes of the three learned tables, for [n, l, k].
        latent_code: what the latent numbers are. "token": each token's own, made by the encoder (the paper). "matrix":
            together, the low-rank factors of the weight matrices in the window, for which nothing is learned
            (`matrix_code`); encoder and decoder correct what the factors give, and embeddings come from the encoder.
        tokenization: how the tokens were cut, "dense" or "sparse"; the feature extractor must cut them alike.
        position_unit: what the third position counts within a layer, "token" or "row"; likewise.
        projection: input of the contrastive head: "pooled" (mean latent over the tokens that hold weights, any
            length) or "flat" (the window's latents flattened, as the paper's code does; at most `window_size` tokens).
        projection_size: width of the contrastive head.
        loss_normalization: what the reconstruction error is measured in: the standard deviation of the "batch" (the
            paper's code), of each "layer" of a window, of each "window", of each "token", or "none".
        loss_mask_padding: leave padded entries out of the loss and its statistics; without it they count as weights 0.
        contrastive_weight: w of (1 - w) x reconstruction + w x contrastive.
        temperature: of NT-Xent.
        noise_std: multiplicative noise of the two views.
        mask_ratio: share of the weights that each view sets to 0. The paper names masking without a ratio and its
            public code ships it off, hence 0.
        denoise: reconstruct the clean tokens; without it each view is its own target, as in the paper's code.
        token_standardization: the encoder sees each token minus its mean over its standard deviation; mean and log
            standard deviation are the last two of the `latent_size` numbers.
        linear_path: adds a linear map token -> latent and one latent -> token (`WSLModel.initialize_linear_path`).
        hidden_act, layer_norm_eps, initializer_range: as everywhere in transformers.

    Raises:
        huggingface_hub.errors.StrictDataclassError: for a wrong type or an impossible combination, saying which.
    """

    model_type = MODEL_TYPE
    # Blocks are the units of sharding, relative to the encoder and to the decoder; there is no final norm.
    base_model_fsdp_plan = {"layers.*": "free_full_weight"}

    token_size: int = 230
    window_size: int = 512
    hidden_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    intermediate_size: int | None = None
    latent_size: int = 128
    position_encoding: Literal["sinusoidal", "learned"] = "sinusoidal"
    latent_code: str = "token"
    max_positions: list[int] | tuple[int, ...] = field(default_factory=lambda: [55000, 100, 550])
    tokenization: Literal["dense", "sparse"] = "dense"
    position_unit: Literal["token", "row"] = "token"
    projection: Literal["pooled", "flat"] = "pooled"
    projection_size: int = 30
    loss_normalization: Literal["none", "layer", "batch", "window", "token"] = "batch"
    loss_mask_padding: bool = True
    contrastive_weight: float | int = 0.05
    temperature: float | int = 0.1
    noise_std: float | int = 0.1
    mask_ratio: float | int = 0.0
    denoise: bool = False
    token_standardization: bool = False
    linear_path: bool = False
    hidden_act: str = "gelu"
    layer_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        if not kwargs.pop(FROM_FILE, False):
            not_theirs = [name for name in kwargs if not _is_of_transformers(name)]
            own = [item.name for item in fields(self) if not hasattr(PreTrainedConfig, item.name)]
            check_keywords(type(self).__name__, not_theirs, own)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if not is_remote_code():
            # Written into every config.json (to_diff_dict) for processes without this library. Here the registered
            # classes serve, and `pipeline()` would ask for trust_remote_code as soon as it saw custom_pipelines.
            kwargs.pop("auto_map", None)
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "WSLConfig":
        """As `PreTrainedConfig.from_pretrained`; "default" is the backbone that comes with the library."""
        from .checkpoints.hub import verify  # here, for the Auto classes that it imports

        name = resolve_default(pretrained_model_name_or_path)
        verify(name, CONFIG_NAME, kwargs)
        return super().from_pretrained(name, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "WSLConfig":
        """As `PreTrainedConfig.from_dict`: takes unknown keys too, for a file may be of another version."""
        return super().from_dict({**config_dict, FROM_FILE: True}, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> "WSLConfig":
        """As `PreTrainedConfig.from_json_file`, with unknown keys."""
        return cls(**cls._dict_from_json_file(json_file), **{FROM_FILE: True})

    @classmethod
    def from_size(cls, name: str, **overrides) -> "WSLConfig":
        """The configuration of a named size, with `overrides` on top.

        `nano` and `tiny` are ours; `hf-small` (456.1 M parameters), `hf-large` (909.1 M) and `sane` (865.1 M) are the
        paper's (Table 4).

        Raises:
            ValueError: for an unknown name.
        """
        if name not in SIZES:
            raise ValueError(f"Unknown size {name!r}. Choose one of: {', '.join(SIZES)}.")
        return cls(**{**SIZES[name], **overrides})

    @property
    def num_token_statistics(self) -> int:
        """Counts the encoder's numbers for a token's own statistics: 2 with `token_standardization`, else 0."""
        return 2 if self.token_standardization else 0

    def validate_sizes(self):
        for name in (
            "token_size",
            "window_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "latent_size",
            "projection_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers must be at most {MAX_LAYERS:,}, got {self.num_hidden_layers:,}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}): every head gets an equal share of the width."
            )
        if self.hidden_size % 2:
            raise ValueError(
                f"hidden_size must be even, got {self.hidden_size}: half of it holds sines (or the first learned "
                "table), half of it cosines (or the second)."
            )
        if self.latent_size <= self.num_token_statistics:
            raise ValueError(
                f"latent_size must be above 2 with token_standardization, got {self.latent_size}: mean and log "
                "standard deviation take two of the numbers."
            )

    def validate_latent_code(self):
        code_of(self).check_config()

    def validate_max_positions(self):
        if len(self.max_positions) != 3 or min(self.max_positions) < 1:
            raise ValueError(
                "max_positions must be three positive sizes, for the index in the model, the layer index and the "
                f"index in the layer; got {list(self.max_positions)}."
            )

    def validate_training(self):
        for name, low, high in (("contrastive_weight", 0, 1), ("mask_ratio", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie between {low} and {high}, got {getattr(self, name)}.")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")
        if self.noise_std < 0:
            raise ValueError(f"noise_std must not be negative, got {self.noise_std}.")

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of config.json: the values, and where the code that reads them lies."""
        return {**super().to_diff_dict(), "auto_map": dict(AUTO_MAP), "custom_pipelines": dict(CUSTOM_PIPELINES)}

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        return without_code_files(super()._get_files_timestamps(working_dir))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """As `PreTrainedConfig.save_pretrained`, and copies the code files that `auto_map` names beside config.json.

        Here rather than in the model, so that whoever writes a config.json (the model, a trainer, PEFT) leaves a
        folder that works without this library.
        """
        # Set on remotely loaded classes; transformers would then overwrite auto_map with this one class.
        type(self)._auto_class = None
        if not os.path.isfile(save_directory):
            copy_code_files(save_directory)
        # As text: to name the repository after it, transformers splits it.
        super().save_pretrained(os.fspath(save_directory), push_to_hub=push_to_hub, **kwargs)


def _is_of_transformers(key: str) -> bool:
    """Whether a key of a configuration is one that transformers knows, of whatever model."""
    known = key.startswith("_") or key in TRANSFORMERS_KEYS or hasattr(PreTrainedConfig, key)
    return known or hasattr(GenerationConfig(), key)
