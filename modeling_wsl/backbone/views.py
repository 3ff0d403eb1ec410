"""The two views of a window that the contrastive loss compares: multiplicative noise and masking."""

import torch


def augment(
    tokens: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    noise_std: float = 0.1,
    mask_ratio: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One view: each weight times (1 + noise_std x normal), then each weight set to 0 with probability `mask_ratio`.

    The noise is multiplicative because weights of different layers differ in scale by orders of magnitude. Padding is
    0 before and after.

    Args:
        tokens: [batch, tokens, d_t].
        token_mask: bool of the same shape, false where an entry is padding; None for no padding.
        generator: source of the random numbers, on the device of `tokens`. None is torch's global one, which
            `torch.manual_seed` seeds and Accelerate saves and restores with a training run.

    Returns:
        A new tensor like `tokens`.
    """
    view = tokens
    if noise_std:
        noise = torch.randn(tokens.shape, dtype=tokens.dtype, device=tokens.device, generator=generator)
        view = noise.mul_(noise_std).add_(1).mul_(tokens)
    if mask_ratio:
        draws = torch.rand(tokens.shape, dtype=torch.float32, device=tokens.device, generator=generator)
        view = torch.where(draws < mask_ratio, 0, view)
    if token_mask is not None:
        view = torch.where(token_mask, view, 0)
    return view


def two_views(
    tokens: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    noise_std: float = 0.1,
    mask_ratio: float = 0.0,
    denoise: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent views of every window, and what the autoencoder must reconstruct from them.

    Args:
        denoise: False: the target of a view is that view itself, noise and masked zeros included, as in the paper's
            code, which makes it a plain autoencoder of perturbed weights. True: the target is the clean window.
        tokens, token_mask, noise_std, mask_ratio, generator: as in `augment`.

    Returns:
        views [2 x batch, tokens, d_t] (the first view of every window, then the second) and targets of that shape.
    """
    views = torch.cat([augment(tokens, token_mask, noise_std, mask_ratio, generator) for _ in range(2)])
    return views, torch.cat([tokens, tokens]) if denoise else views
