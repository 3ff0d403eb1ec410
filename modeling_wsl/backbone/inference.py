"""A copy of a backbone that is ready to run without gradients: its weights cast once, and what a CPU does faster."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..tokens.manifest import check_choice
from .positions import MAX_WAVELENGTH, SinusoidalPositions, check_positions
from .window_workers import raise_trim_threshold


def autocast_type(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that an option `autocast_dtype` names.

    Raises:
        ValueError: a name that is none of "bfloat16" and "float16".
    """
    if not isinstance(dtype, str):
        return dtype
    check_choice("autocast_dtype", dtype, ("bfloat16", "float16"))
    return getattr(torch, dtype)


def inference_backbone(
    model: PreTrainedModel, autocast_dtype: torch.dtype | str | None = None
) -> tuple[PreTrainedModel, torch.dtype | None]:
    """What computes the same as `model` under autocast, to rounding, in less time.

    Autocast casts every weight anew in every forward pass; the copy's are cast once, and on a CPU it takes positions
    by `PositionsByTable`. It shares with `model` the parameters that need no cast, and does not follow later changes
    of the others: make it where it is used, not for keeps.

    Args:
        model: a backbone.
        autocast_dtype: to run under autocast to ("bfloat16"); None: in the dtype of the weights.

    Returns:
        The copy, and None; or the model itself and the dtype for autocast, where there is nothing to gain (float32, a
        copy already) or the weights are offloaded or quantized.
    """
    dtype = autocast_type(autocast_dtype)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    narrow = model.dtype if dtype is None else dtype
    if not dtypes <= {narrow} | ({torch.float32} if dtype is not None else set()):
        return model, dtype
    if any(parameter.is_meta for parameter in model.parameters()):
        return model, dtype
    sines = _sines(model) if model.device.type == "cpu" else []
    if narrow == torch.float32 or (dtypes == {narrow} and not sines):
        return model, None
    # What deepcopy is told to have copied already, it takes as it is.
    fast = copy.deepcopy(model, {id(parameter): _cast(parameter, narrow) for parameter in model.parameters()})
    if model.device.type == "cpu":
        raise_trim_threshold()
    for name in sines:
        setattr(fast, name, PositionsByTable(getattr(fast, name).dim))
    return fast, None


def _sines(model: PreTrainedModel) -> list[str]:
    return [name for name, child in model.named_children() if isinstance(child, SinusoidalPositions)]


class PositionsByTable(nn.Module):
    """`SinusoidalPositions` on a CPU, without a sine for every number: integers [batch, tokens, 3] -> [.., dim].

    A position is 256 times a high part plus a low one, and exp(i (a + b)) is exp(i a) exp(i b): a table of 256 low
    parts, and one of the high parts that occur, which are few among the tokens of some windows, both rounded from
    float64. It lives on the CPU: the high parts that occur are not known on a device without waiting for it.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.frequencies = MAX_WAVELENGTH ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)  # [dim/2]
        angles = torch.arange(256, dtype=torch.float64)[:, None] * self.frequencies
        # sin + i cos lies in memory as the encoding does, sine and cosine alternating.
        self.low = torch.complex(angles.sin(), angles.cos()).to(torch.complex64)  # [256, dim/2]

    def forward(self, positions: Tensor) -> Tensor:
        check_positions(positions)
        flat = positions.reshape(-1, 3).to(torch.int64)
        parts, which = torch.unique(flat >> 8, return_inverse=True)  # [parts], [n, 3]
        angles = 256 * parts.double()[:, None] * self.frequencies
        # i exp(-i (a + b)) = sin(a + b) + i cos(a + b)
        high = torch.complex(angles.cos(), -angles.sin()).to(torch.complex64)  # [parts, dim/2]
        encoding = torch.zeros(len(flat), self.dim // 2, dtype=torch.complex64)
        for coordinate in range(3):
            low = self.low.index_select(0, flat[:, coordinate] & 255)
            encoding.addcmul_(low, high.index_select(0, which[:, coordinate]))
        return torch.view_as_real(encoding).view(*positions.shape[:-1], self.dim)


def _cast(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    if parameter.dtype == dtype:
        return parameter
    return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
