"""hf-wsl: weight-space learning on public models.

Importing it takes no time: names load what they need when they are first used, and the Auto classes and the pipeline
tasks are registered when transformers imports its own (at once, where it has).
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import registration


if TYPE_CHECKING:  # for type checkers and editors; the same names as below
    from .backbone.losses import R2Accumulator, nt_xent, reconstruction_loss, reconstruction_r2
    from .backbone.stack import WSLPreTrainedModel
    from .checkpoints.checkpoint import Checkpoint, open_checkpoint
    from .checkpoints.errors import CheckpointError, NonFiniteWeightsError
    from .configuration_wsl import WSLConfig
    from .embedding.model_embedding import ModelEmbedding, embed_model
    from .feature_extraction_wsl import WSLFeatureExtractor
    from .generation.generated_model import GeneratedModel
    from .loading import DEFAULT_BACKBONE
    from .modeling_wsl import WSLForPreTraining, WSLForPreTrainingOutput, WSLModel, WSLModelOutput
    from .pipelines import WeightEmbeddingPipeline, WeightGenerationPipeline
    from .tokens.manifest import LayerSpec, TensorSpec, WeightManifest

    __version__: str

_MODULES = {
    "backbone.losses": ("R2Accumulator", "nt_xent", "reconstruction_loss", "reconstruction_r2"),
    "backbone.stack": ("WSLPreTrainedModel",),
    "checkpoints.checkpoint": ("Checkpoint", "open_checkpoint"),
    "checkpoints.errors": ("CheckpointError", "NonFiniteWeightsError"),
    "configuration_wsl": ("WSLConfig",),
    "embedding.model_embedding": ("ModelEmbedding", "embed_model"),
    "feature_extraction_wsl": ("WSLFeatureExtractor",),
    "generation.generated_model": ("GeneratedModel",),
    "loading": ("DEFAULT_BACKBONE",),
    "modeling_wsl": ("WSLForPreTraining", "WSLForPreTrainingOutput", "WSLModel", "WSLModelOutput"),
    "pipelines": ("WeightEmbeddingPipeline", "WeightGenerationPipeline"),
    "tokens.manifest": ("LayerSpec", "TensorSpec", "WeightManifest"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "DEFAULT_BACKBONE",
    "GeneratedModel",
    "LayerSpec",
    "ModelEmbedding",
    "NonFiniteWeightsError",
    "R2Accumulator",
    "TensorSpec",
    "WSLConfig",
    "WSLFeatureExtractor",
    "WSLForPreTraining",
    "WSLForPreTrainingOutput",
    "WSLModel",
    "WSLModelOutput",
    "WSLPreTrainedModel",
    "WeightEmbeddingPipeline",
    "WeightGenerationPipeline",
    "WeightManifest",
    "__version__",
    "embed_model",
    "nt_xent",
    "open_checkpoint",
    "reconstruction_loss",
    "reconstruction_r2",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version  # takes as long as all the rest

        try:
            return version("hf-wsl")
        except PackageNotFoundError:  # a copy of the source that was never installed
            return "unknown"
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # the next time it is at hand
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


registration.install()
