"""What is learned: how a batch goes through a model, and which figures describe the result."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_wsl.generation.ranking import logits_of


class ImageClassification:
    """Batches `(images float [B, C, H, W], labels int64 [B])`; the model gives logits `[B, classes]`, or an output
    that has them as `.logits`."""

    name = "image-classification"
    unit = "image"
    memory_format = torch.channels_last  # depthwise convolutions take half the time on a CPU
    metrics = ("loss", "accuracy", "f1")

    def forward(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """(logits `[B, classes]`, labels `[B]`)."""
        images, labels = batch
        return logits_of(model(images.contiguous(memory_format=self.memory_format))), labels

    def num_classes(self, model: nn.Module, batch: Any) -> int:
        """Logits that the model gives, found by passing one image through it in eval mode.

        Raises:
            ValueError: the model cannot take such an image, or gives no logits `[B, classes]`.
        """
        images = batch[0][:1]
        was_training = model.training
        device = next(model.parameters()).device
        try:
            with torch.no_grad():
                logits = self.forward(model.eval(), (images.to(device), None))[0]
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"The model cannot take images of shape {tuple(images.shape[1:])}: {str(error).splitlines()[0]}. "
                "Set the image size and channels of the data, or build the model for them (img_size, in_chans)."
            ) from error
        finally:
            model.train(was_training)
        if logits.ndim != 2:
            raise ValueError(
                f"The model gives {tuple(logits.shape)} for one image, where logits [1, classes] are due."
            )
        return logits.shape[1]

    def highest_class(self, batch: Any) -> int:
        return int(batch[1].max())


class CausalLanguageModeling:
    """Batches `{"input_ids": int64 [B, T]}` for a causal language model of transformers; each token but the first is
    predicted from those before it (paper, appendix C.2, Table 5)."""

    name = "causal-language-modeling"
    unit = "block"
    memory_format = torch.contiguous_format
    metrics = ("loss", "perplexity", "accuracy", "f1")

    def forward(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """(logits `[B * (T - 1), vocabulary]`, the tokens they predict `[B * (T - 1)]`)."""
        tokens = batch["input_ids"]
        return logits_of(model(tokens, use_cache=False))[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()

    def num_classes(self, model: nn.Module, batch: Any) -> int:
        """Size of the model's vocabulary.

        Raises:
            ValueError: it is no language model of transformers, or its longest input is shorter than a block.
        """
        if not isinstance(model, PreTrainedModel) or not isinstance(model.get_output_embeddings(), nn.Linear):
            raise ValueError(
                f"{type(model).__name__} is no language model of transformers; {self.name} needs one "
                "(GPT2LMHeadModel, ...)."
            )
        longest, length = getattr(model.config, "max_position_embeddings", None), batch["input_ids"].shape[1]
        if longest is not None and length > longest:
            raise ValueError(f"Blocks have {length} tokens, the model takes {longest}. Lower the block size to that.")
        return model.get_input_embeddings().weight.shape[0]

    def highest_class(self, batch: Any) -> int:
        return int(batch["input_ids"].max())


Task = ImageClassification | CausalLanguageModeling
IMAGE_CLASSIFICATION, CAUSAL_LANGUAGE_MODELING = ImageClassification(), CausalLanguageModeling()


def scores(task: Task, losses: np.ndarray, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's figures by name; arguments as `metrics.classification_scores`."""
    from .metrics import classification_scores  # here: `evaluate` takes seconds to import

    found = classification_scores(losses, predictions, labels)
    return {name: found[name] for name in task.metrics}
