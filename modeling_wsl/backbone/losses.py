"""Masked reconstruction loss (paper, section 3.2), NT-Xent, and R2 of a reconstruction. All computed in float32."""

import torch
from torch.nn import functional as F


# Below this a token is constant: it has no shape to reconstruct, only a level.
MIN_STD = 1e-8
# In R2 a token's deviation counts as at least this share of the root mean square of its layer: else one token of a
# dead filter, whose entries are rounding, outweighs a whole model.
MIN_RELATIVE_STD = 1e-3
# Added to the standard deviation that divides the error; the value of the paper's code.
STD_EPS = 1e-4


def masked_moments(
    values: torch.Tensor, mask: torch.Tensor | None = None, dim: int | tuple[int, ...] = -1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, population variance and number of the valid entries over `dim`, which is kept with size 1.

    Args:
        values: float tensor.
        mask: bool, true where an entry counts; same shape as `values`, or None for all. Empty groups give 0, 0, 0.
    """
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    count = mask.sum(dim, keepdim=True)
    divisor = count.clamp_min(1).to(values.dtype)
    mean = torch.where(mask, values, 0).sum(dim, keepdim=True) / divisor
    variance = torch.where(mask, values - mean, 0).square().sum(dim, keepdim=True) / divisor
    return mean, variance, count


def token_moments(
    tokens: torch.Tensor, token_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`masked_moments` of each token, [batch, tokens, d_t] -> three of [batch, tokens, 1], computed in float32.

    Taken around the token's first entry, so that the variance of a constant token is exactly 0 and not the rounding
    error of its mean.
    """
    values = tokens.float()
    first = values[..., :1] if token_mask is None else torch.where(token_mask[..., :1], values[..., :1], 0)
    mean, variance, count = masked_moments(values - first, token_mask, dim=-1)
    return mean + first, variance, count


def _layer_moments(tokens: torch.Tensor, mask: torch.Tensor, layer_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Moments of the valid entries of each (window, layer), given back to every token: three of [batch, tokens, 1]."""
    # Layer ids -> 0 .. number of layers - 1 within each window, in whatever order the tokens come.
    ordered, order = layer_ids.sort(dim=-1)
    rank_in_order = F.pad((ordered[:, 1:] != ordered[:, :-1]).long().cumsum(-1), (1, 0))
    group = torch.zeros_like(layer_ids).scatter(-1, order, rank_in_order)  # [batch, tokens]

    def total_per_layer(per_token: torch.Tensor) -> torch.Tensor:
        totals = torch.zeros_like(per_token).scatter_add(-1, group, per_token)
        return totals.gather(-1, group)[..., None]  # [batch, tokens, 1]

    count = total_per_layer(mask.sum(-1))
    divisor = count.clamp_min(1).to(tokens.dtype)
    mean = total_per_layer(torch.where(mask, tokens, 0).sum(-1)) / divisor
    variance = total_per_layer(torch.where(mask, tokens - mean, 0).square().sum(-1)) / divisor
    return mean, variance, count


def loss_scale(
    tokens: torch.Tensor,
    token_mask: torch.Tensor | None,
    positions: torch.Tensor | None = None,
    normalization: str = "batch",
    mask_padding: bool = True,
    eps: float = STD_EPS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The divisor of the error in `reconstruction_loss`, and the entries that it averages over; arguments as there.

    Returns:
        sigma + eps, float32, broadcastable to the tokens; bool [batch, tokens, d_t], true where an entry counts.
    """
    if token_mask is None:
        token_mask = torch.ones_like(tokens, dtype=torch.bool)
    values, mask = tokens.detach().float(), token_mask
    if not mask_padding:
        values = torch.where(token_mask, values, 0)
        mask = token_mask.any(-1, keepdim=True).expand_as(token_mask)
    if normalization == "none":
        return torch.ones((), device=tokens.device), mask
    if normalization == "batch":
        _, variance, count = masked_moments(values, mask, dim=(0, 1, 2))
    elif normalization == "window":
        _, variance, count = masked_moments(values, mask, dim=(1, 2))
    elif normalization == "token":
        _, variance, count = token_moments(values, mask)
    elif normalization == "layer":
        if positions is None:
            raise ValueError('loss_normalization="layer" needs positions: positions[..., 1] is the layer index.')
        _, variance, count = _layer_moments(values, mask, positions[..., 1])
    else:
        raise ValueError(
            f"Unknown loss_normalization {normalization!r}. Choose one of: none, layer, batch, window, token."
        )
    varies = (variance >= MIN_STD**2) & (count > 1)
    return variance.clamp_min(MIN_STD**2).sqrt() + eps, mask & varies


def reconstruction_loss(
    reconstruction: torch.Tensor,
    tokens: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    normalization: str = "batch",
    mask_padding: bool = True,
    eps: float = STD_EPS,
) -> torch.Tensor:
    """Masked loss normalization (paper, section 3.2, eq. 1): the error in units of the tokens' standard deviation.

    Both sides of eq. 1 are shifted by the same mean, which cancels; what is left is the mean over the valid entries of
    ((reconstruction - tokens) / (sigma + eps))^2. `normalization` says over what sigma is taken:

    * "none": sigma + eps = 1, the plain error.
    * "batch": all valid entries of the batch: the paper's code. One number, so layers are not rebalanced.
    * "window": the valid entries of each window.
    * "layer": the valid entries of each layer within each window (layer = `positions[..., 1]`).
    * "token": the valid entries of each token: the reading of the paper's prose. Tokens with fewer than 2 entries or a
      standard deviation below 1e-8 are left out, and so are constant layers and windows above.

    Args:
        reconstruction: [batch, tokens, d_t].
        tokens: [batch, tokens, d_t], the target; its statistics are constants to the gradient.
        token_mask: bool [batch, tokens, d_t], true where an entry is a weight; None for all.
        positions: integers [batch, tokens, 3]; needed by "layer" only.
        mask_padding: without it the padded entries of a token count as weights of value 0, in the error and in sigma.
            Tokens that hold no weight at all never count.

    Returns:
        float32 scalar; 0 where nothing counts.

    Raises:
        ValueError: for an unknown normalization, or "layer" without positions.
    """
    if token_mask is None:
        token_mask = torch.ones_like(tokens, dtype=torch.bool)
    scale, counted = loss_scale(tokens, token_mask, positions, normalization, mask_padding, eps)
    target = tokens.float() if mask_padding else torch.where(token_mask, tokens.float(), 0)
    error = torch.where(counted, (reconstruction.float() - target) / scale, 0)
    return error.square().sum() / counted.sum().clamp_min(1)


def nt_xent(projections: torch.Tensor, temperature: float = 0.1, row_mask: torch.Tensor | None = None) -> torch.Tensor:
    """NT-Xent (SimCLR): each view must find its partner among the other views of the batch by cosine similarity.

    Args:
        projections: [2 x batch, features]: the first view of every window, then the second. Any batch size; with one
            window there is nothing to tell apart and the loss is 0.
        temperature: divides the similarities.
        row_mask: bool [2 x batch], false for rows to leave out (windows without a weight); None for all.

    Returns:
        float32 scalar, computed in float32 inside autocast too. Negatives come from this process's batch only.

    Raises:
        ValueError: for an odd number of rows.
    """
    rows = projections.shape[0]
    if rows % 2:
        raise ValueError(f"NT-Xent needs two views of every window, an even number of rows; got {rows}.")
    with torch.autocast(device_type=projections.device.type, enabled=False):
        directions = F.normalize(projections.float(), dim=-1)
        similarity = directions @ directions.T / temperature  # [2 batch, 2 batch]
        index = torch.arange(rows, device=projections.device)
        excluded = index[:, None] == index[None, :]
        if row_mask is not None:
            excluded = excluded | ~row_mask[None, :]
        # Not -inf: a row whose candidates are all excluded must still have a finite gradient.
        similarity = similarity.masked_fill(excluded, torch.finfo(torch.float32).min)
        partner = (index + rows // 2) % rows
        loss = F.cross_entropy(similarity, partner, reduction="none")
        if row_mask is None:
            return loss.mean()
        return torch.where(row_mask, loss, 0).sum() / row_mask.sum().clamp_min(1)


def _r2_sums(
    reconstruction: torch.Tensor,
    tokens: torch.Tensor,
    token_mask: torch.Tensor | None,
    standardize: str,
    layer_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual and total sum of squares over the valid entries of the tokens that vary, float32 scalars."""
    if standardize not in ("token", "none"):
        raise ValueError(f'standardize must be "token" or "none", got {standardize!r}.')
    reconstruction, tokens = reconstruction.float(), tokens.float()
    if token_mask is None:
        token_mask = torch.ones_like(tokens, dtype=torch.bool)
    mean, variance, count = token_moments(tokens, token_mask)
    counted = token_mask & (variance >= MIN_STD**2) & (count > 1)
    scale = torch.ones_like(variance)
    if standardize == "token":
        rows = tokens.reshape(-1, *tokens.shape[-2:])  # [windows, tokens, d_t]
        ids = (
            torch.zeros_like(rows[..., 0], dtype=torch.long)
            if layer_ids is None
            else layer_ids.reshape(rows.shape[:2])
        )
        level, spread, _ = _layer_moments(rows, token_mask.expand_as(tokens).reshape(rows.shape), ids)
        least = (MIN_RELATIVE_STD**2 * (level**2 + spread)).reshape(variance.shape)
        scale = torch.maximum(variance, least).clamp_min(MIN_STD**2).sqrt()
    residual = torch.where(counted, (reconstruction - tokens) / scale, 0).square().sum()
    total = torch.where(counted, (tokens - mean) / scale, 0).square().sum()
    return residual, total


@torch.no_grad()
def reconstruction_r2(
    reconstruction: torch.Tensor,
    tokens: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    standardize: str = "token",
    layer_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Share of the weights' variance that the reconstruction explains, per token.

    1 - sum((reconstruction - t)^2 / sigma_t^2) / sum((t - mean_t)^2 / sigma_t^2), mean and sigma over the valid
    entries of each token, sigma at least `MIN_RELATIVE_STD` of the root mean square of its layer (of its window, where
    no layers are given); `standardize="none"` puts sigma = 1. Tokens with sigma below 1e-8 or fewer than 2 valid
    entries are left out. Giving back each token's mean scores 0.

    Args:
        reconstruction, tokens: [batch, tokens, d_t] (any leading dimensions).
        token_mask: bool of the same shape, or None.
        layer_ids: integers [batch, tokens], `positions[..., 1]`.

    Returns:
        float32 scalar without gradient; NaN where no token varies.
    """
    residual, total = _r2_sums(reconstruction, tokens, token_mask, standardize, layer_ids)
    return 1 - residual / total


class R2Accumulator:
    """`reconstruction_r2` over many batches, and over many processes: float64 sums, so that no order matters.

    Every process calls `update` with its batches; `state()` is a tensor that can be summed over processes
    (`accelerator.reduce(r2.state(), "sum")`) and given to `merge` of a fresh accumulator.
    """

    def __init__(self, standardize: str = "token"):
        self.standardize = standardize
        self.residual = torch.zeros((), dtype=torch.float64)
        self.total = torch.zeros((), dtype=torch.float64)

    def __repr__(self) -> str:
        return f"R2Accumulator({self.standardize!r}, r2={self.compute():.4f})"

    @torch.no_grad()
    def update(
        self,
        reconstruction: torch.Tensor,
        tokens: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        layer_ids: torch.Tensor | None = None,
    ) -> None:
        """Adds a batch; arguments as in `reconstruction_r2`."""
        residual, total = _r2_sums(reconstruction, tokens, token_mask, self.standardize, layer_ids)
        self.residual += residual.to("cpu", torch.float64)
        self.total += total.to("cpu", torch.float64)

    def state(self) -> torch.Tensor:
        """float64 [2] on the CPU: residual and total sum of squares so far."""
        return torch.stack([self.residual, self.total])

    def merge(self, other: "R2Accumulator | torch.Tensor") -> None:
        """Adds the sums of another accumulator, or of its `state()`."""
        state = other if isinstance(other, torch.Tensor) else other.state()
        residual, total = state.to("cpu", torch.float64)
        self.residual += residual
        self.total += total

    def compute(self) -> float:
        """R2 over everything added so far; NaN before the first token that varies."""
        return (1 - self.residual / self.total).item()
