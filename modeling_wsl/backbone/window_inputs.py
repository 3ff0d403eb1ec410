"""Checks of a window's tensors, and which of its tokens and entries count."""

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)


def check_inputs(
    name: str,
    windows: torch.Tensor,
    size: int,
    token_mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> None:
    """Raises ValueError unless all fits `windows` [batch, tokens, size], which messages call `name`."""
    if windows.ndim != 3 or windows.shape[-1] != size:
        option = "token_size" if name == "tokens" else "latent_size"
        raise ValueError(
            f"{name} must have shape [batch, tokens, {size}] ({option}={size}), got {list(windows.shape)}. "
            f"A single window needs its batch dimension: {name}[None]."
        )
    if not windows.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {windows.dtype}.")
    if token_mask is not None and (token_mask.shape != windows.shape or token_mask.dtype != torch.bool):
        raise ValueError(
            f"token_mask must be a bool tensor of the tokens' shape {list(windows.shape)}, got "
            f"{token_mask.dtype} {list(token_mask.shape)}."
        )
    batch, num_tokens = windows.shape[:2]
    if positions is not None and positions.shape[:-1] not in ((batch, num_tokens), (1, num_tokens)):
        raise ValueError(
            f"positions must have shape [{batch}, {num_tokens}, 3] for {batch} windows of {num_tokens} tokens, "
            f"got {list(positions.shape)}. A single window needs its batch dimension: positions[None]."
        )
    # Four dimensions: a mask already prepared for the attention function, which transformers passes on as it is.
    if attention_mask is not None and attention_mask.ndim != 4 and attention_mask.shape != (batch, num_tokens):
        raise ValueError(
            f"attention_mask must have shape [{batch}, {num_tokens}] ([batch, tokens]), got "
            f"{list(attention_mask.shape)}."
        )


def expect_positions(tokens: torch.Tensor, token_mask: torch.Tensor | None, positions: torch.Tensor | None) -> None:
    """Warns once of dense tokens [batch, tokens, d_t] of several layers that come without positions.

    They are then taken for the first tokens of one layer, which moves latents by a quarter. A token that is not full
    is the end of a layer; without a mask, zeros at its end tell.
    """
    if positions is not None or torch.compiler.is_compiling() or tokens.device.type == "meta":
        return
    first, last = (tokens[..., index] != 0 if token_mask is None else token_mask[..., index] for index in (0, -1))
    if (first[:, :-1] & ~last[:, :-1] & first[:, 1:]).any():
        logger.warning_once(
            "tokens of more than one layer came without positions, and are taken for the first tokens of one layer. "
            "Pass positions and token_mask as the feature extractor gives them: model(**fx(source, "
            'return_tensors="pt")).'
        )


def attendable_tokens(
    token_mask: torch.Tensor | None, attention_mask: torch.Tensor | None = None
) -> torch.Tensor | None:
    """The attention mask [batch, tokens]: as given, else the tokens that hold a weight, else None (all of them)."""
    if attention_mask is None and token_mask is not None:
        return token_mask.any(-1)
    return attention_mask


def valid_mask(
    tokens: torch.Tensor, token_mask: torch.Tensor | None, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Bool [batch, tokens, d_t], true where an entry is a weight of a token that is attended to; None for all."""
    if attention_mask is None:
        return token_mask
    attended = attention_mask.bool()[..., None].to(tokens.device)
    return attended.expand(tokens.shape) if token_mask is None else token_mask.to(tokens.device) & attended
