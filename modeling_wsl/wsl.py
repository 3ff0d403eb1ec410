"""The facade that saved folders name in `auto_map`: remote code reaches every other file of the library from here."""

from .configuration_wsl import WSLConfig
from .feature_extraction_wsl import WSLFeatureExtractor
from .modeling_wsl import WSLForPreTraining, WSLModel
from .pipelines import WeightEmbeddingPipeline, WeightGenerationPipeline


__all__ = [
    "WSLConfig",
    "WSLFeatureExtractor",
    "WSLForPreTraining",
    "WSLModel",
    "WeightEmbeddingPipeline",
    "WeightGenerationPipeline",
]
