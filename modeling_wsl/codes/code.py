"""The part that every code plays: what the latents of a window are, and what may be done with them.

A code is a file beside this one with a subclass of `WindowCode`, and an entry in `registry.CODES`. The networks are
the model's, for their names are those of saved weights; a code says what goes through them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


class CodedWindows(NamedTuple):
    """The results of a code on windows; `encoder` and `decoder` are the outputs of the two transformers."""

    latents: torch.Tensor
    features: torch.Tensor
    reconstruction: torch.Tensor
    encoder: ModelOutput
    decoder: ModelOutput


class WindowCode(ABC):
    """The meaning of the latents of a backbone's windows, `config.latent_code`.

    Attributes:
        name: the value of `latent_code`.
        by_token: each token has latents of its own, so that those of several models may be mixed, interpolated and
            drawn token by token. False: the latents of a window belong together.
        in_context: latents come out of the network, which sees the neighbors of a token: windows are encoded with a
            halo. False: they follow from the window alone, one window at a time, on the CPU.
        starts_silent: the decoder's output is 0 before training, because something beside it speaks already.
        holds_statistics: with `token_standardization`, the last two latents of a token are its mean and the logarithm
            of its standard deviation.
    """

    name: str
    by_token: bool
    in_context: bool
    starts_silent: bool
    holds_statistics: bool

    def __init__(self, config: PreTrainedConfig):
        self.config = config

    @property
    @abstractmethod
    def decoder_size(self) -> int:
        """Numbers per token that the decoder reads."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """Words for a backbone's card, to go on after "it": a backbone's work on its tokens."""

    def check_config(self) -> None:  # noqa: B027 - most codes allow it
        """Raises ValueError for a configuration that the code cannot work with."""

    @abstractmethod
    def encode(
        self,
        model: PreTrainedModel,
        tokens: torch.Tensor,
        token_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        row_sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Latents [batch, tokens, latent_size]; arguments as in `WSLModel.encode`, checked already."""

    @abstractmethod
    def decode(
        self,
        model: PreTrainedModel,
        latents: torch.Tensor,
        positions: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tokens [batch, tokens, token_size]; arguments as in `WSLModel.decode`, checked already."""

    @abstractmethod
    def forward(
        self,
        model: PreTrainedModel,
        tokens: torch.Tensor,
        token_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> CodedWindows:
        """Both ways at once; arguments as in `encode`, `kwargs` for the transformers."""

    def decoding(
        self, model: PreTrainedModel, latents: torch.Tensor, positions: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], Callable[..., torch.Tensor]]:
        """The rest of decoding a whole model, once everything that needs no context is done.

        Args:
            latents: [T, latent_size].
            positions: [T, 3].

        Returns:
            fields [T, ...], and a function of windows of them, each [rows, tokens, ...], that gives tokens
            [rows, tokens, token_size] and may be given any halo.
        """
        return {"latents": latents, "positions": positions}, model.decode

    @abstractmethod
    def noise_scale(self, latents: torch.Tensor) -> torch.Tensor:
        """As `WSLModel.noise_scale`."""

    def size(self, latents: torch.Tensor) -> tuple[int, int]:
        """Of the latents of one window [tokens, latent_size]: how many are indices and counts, and how many say
        anything at all; the rest fills the window up."""
        return 0, latents.numel()

    def check_interpolation(self) -> None:  # noqa: B027 - most codes allow it
        """Raises ValueError where there is no straight line between the latents of two models."""
