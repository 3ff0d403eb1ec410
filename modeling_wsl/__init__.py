"""hf-wsl: weight-space learning on public models. Importing it registers the Auto classes and the pipeline tasks."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForPreTraining
from transformers.pipelines import PIPELINE_REGISTRY

from .backbone.losses import R2Accumulator, nt_xent, reconstruction_loss, reconstruction_r2
from .backbone.stack import WSLPreTrainedModel
from .checkpoints.checkpoint import Checkpoint, CheckpointError, NonFiniteWeightsError, open_checkpoint
from .configuration_wsl import WSLConfig
from .feature_extraction_wsl import WSLFeatureExtractor
from .generation.generated_model import GeneratedModel
from .loading import DEFAULT_FOLDER
from .modeling_wsl import (
    WSLForPreTraining,
    WSLForPreTrainingOutput,
    WSLModel,
    WSLModelOutput,
)
from .pipelines import WeightEmbeddingPipeline, WeightGenerationPipeline
from .remote_code import CUSTOM_PIPELINES
from .tokens.manifest import LayerSpec, TensorSpec, WeightManifest


AutoConfig.register(WSLConfig.model_type, WSLConfig, exist_ok=True)
AutoModel.register(WSLConfig, WSLModel, exist_ok=True)
AutoModelForPreTraining.register(WSLConfig, WSLForPreTraining, exist_ok=True)
AutoFeatureExtractor.register(WSLConfig, WSLFeatureExtractor, exist_ok=True)
for _task, _pipeline in (
    ("weight-embedding", WeightEmbeddingPipeline),
    ("weight-generation", WeightGenerationPipeline),
):
    PIPELINE_REGISTRY.register_pipeline(
        _task,
        pipeline_class=_pipeline,
        pt_model=AutoModel,
        default={"model": (str(DEFAULT_FOLDER), None)},
        type=CUSTOM_PIPELINES[_task]["type"],
    )

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "GeneratedModel",
    "LayerSpec",
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
    "nt_xent",
    "open_checkpoint",
    "reconstruction_loss",
    "reconstruction_r2",
]
