"""Models to rows of numbers: by a backbone, or by the methods that a backbone must beat."""

from .embed_config import METHODS, EmbedConfig
from .embed_models import EmbedReport, embed, embed_models
from .embedding_table import EmbeddingTable


__all__ = ["METHODS", "EmbedConfig", "EmbedReport", "EmbeddingTable", "embed", "embed_models"]
