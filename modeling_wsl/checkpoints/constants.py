"""Stored constants: tensors that the architecture computes and training does not change, such as causal masks.

They are carried beside the tokens, and not tested for finiteness: masks hold infinity. A name alone decides where no
weight has it; where one might, the shape decides too, and then some of the values.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from ..tokens.manifest import TensorSpec, split_name
from .containers.container import Contents


MAX_NAME = 120  # characters of a name that are looked at, from its end
SAMPLED_ENTRIES = 4096
SAMPLED_ROWS = 32
SMALL = 16  # numbers of a mean or deviation of an image's channels
# Sixteen-bit tables: an entry is off by up to 2^-8 of itself.
SINUSOID_TOLERANCE = 1e-2
BLOCKED = -50.0  # what is added to a logit that must not count: Swin adds -100, others -1e4 or minus infinity


class Rule(NamedTuple):
    """Constants of one kind.

    Attributes:
        names: matches the end of a name, from the beginning of one of its parts.
        shape: whether a shape fits.
        values: whether the values fit; None: name and shape are enough.
    """

    names: re.Pattern[str]
    shape: Callable[[tuple[int, ...]], bool]
    values: Callable[[torch.Tensor], bool] | None = None


def find_constants(
    specs: Mapping[str, TensorSpec], read: Callable[[str], torch.Tensor] | None = None
) -> frozenset[str]:
    """The names of the constants among tensors.

    Args:
        specs: all tensors.
        read: gives a tensor; only those whose name and shape may be a constant's are read. None: what only values
            tell is no constant (a table of sines and cosines).
    """
    names = set()
    for name, spec in specs.items():
        end = name[-MAX_NAME:].replace("/", ".")
        fitting = [rule for rule in RULES if rule.names.search(end) and rule.shape(spec.shape)] if spec.numel else []
        by_values = (rule.values is None or (read is not None and rule.values(read(name))) for rule in fitting)
        if any(by_values) or _is_image_statistic(name, spec, specs):
            names.add(name)
    return frozenset(names)


def with_constants(contents: Contents) -> Contents:
    """Contents whose `constants` are known; tied names of a constant are constants."""
    owner = contents.owners

    def read(name: str) -> torch.Tensor:
        return contents.read(owner.get(name, name))

    names = contents.constants | find_constants(contents.specs, read)
    stored = {owner.get(name, name) for name in names}
    return replace(contents, constants={name for name in contents.specs if owner.get(name, name) in stored})


def _is_image_statistic(name: str, spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether it is the mean or deviation by which a module normalizes its input: a pair of a few numbers."""
    prefix, leaf = split_name(name)
    if leaf not in ("mean", "std", "var") or not 1 <= spec.numel <= SMALL:
        return False
    pair = ("mean",) if leaf != "mean" else ("std", "var")
    start = name[: len(name) - len(leaf)]
    return any(start + other in specs and specs[start + other].shape == spec.shape for other in pair)


def is_mask(tensor: torch.Tensor) -> bool:
    """Whether entries say only "counts" or "does not": 0 and 1, or 0 and a large negative number."""
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
    sample = flat[:: max(1, len(flat) // SAMPLED_ENTRIES)].double()
    blocked = sample <= BLOCKED
    if blocked.any():
        return bool((blocked | (sample == 0)).all())
    return bool(((sample == 0) | (sample == 1)).all())


def is_causal_mask(tensor: torch.Tensor) -> bool:
    """Whether it is a mask that hides the last place from the first."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return bool(rows[0, 0] != rows[0, -1]) and is_mask(tensor)


def is_sinusoidal(tensor: torch.Tensor) -> bool:
    """Whether rows are sines and cosines of a position: every pair adds up to one, so every row to half its width.

    Holds for positions on a line and on a grid, whatever the order of sines and cosines. A row of zeros (of a class
    token) and columns of zeros may be among them.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    sample = rows[torch.linspace(0, len(rows) - 1, min(SAMPLED_ROWS, len(rows))).long()].double()
    sample = sample[sample.abs().sum(1) > 0]
    if len(sample) < 4 or not bool((sample.abs() <= 1 + SINUSOID_TOLERANCE).all()):
        return False
    half = sample.abs().amax(0).gt(0).sum() / 2
    return bool((sample.square().sum(1) - half).abs().max() <= SINUSOID_TOLERANCE * half)


def is_decreasing(tensor: torch.Tensor) -> bool:
    """Whether entries are positive frequencies from high to low."""
    values = tensor.double()
    return bool((values > 0).all()) and bool((values[1:] < values[:-1]).all())


def is_count(tensor: torch.Tensor) -> bool:
    """Whether entries are 0, 1, 2 ..."""
    return bool((tensor.reshape(-1).double() == torch.arange(tensor.numel())).all())


def _any(shape: tuple[int, ...]) -> bool:
    return True


def _line(shape: tuple[int, ...]) -> bool:
    return len(shape) == 1


def _square(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and shape[-1] == shape[-2] > 1


def _one_square(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[:2] == (1, 1) and _square(shape)


def _table(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and shape[-1] >= 4


def _rule(names: str, shape: Callable = _any, values: Callable | None = None) -> Rule:
    return Rule(re.compile(rf"(?:^|\.)(?:{names})$"), shape, values)


RULES = (
    # attention masks: GPT-2, GPT-J, GPT-NeoX, minGPT; CLIP, Swin
    _rule(r"\w*(?:attn|attention|att)\.bias", _one_square, is_causal_mask),
    _rule("masked_bias", lambda shape: shape in ((), (1,))),
    _rule("(?:attn|causal|future|attention)_mask|tril|triu", _square),
    _rule(r"mask|\w*_mask|causal", _square, is_causal_mask),
    _rule("alibi|alibi_slopes|slopes"),
    # positions
    _rule("position_ids|token_type_ids|pos_ids|position_indices"),
    _rule(r"relative_position_ind(?:ex|ices)|rel(?:ative)?_pos_ind(?:ex|ices)|attention_bias_idxs"),
    _rule("relative_coords(?:_table)?|rel_coords(?:_table)?"),
    _rule(r"(?:\w*_)?inv_freq|(?:cos|sin)_cached?|(?:cos|sin)_table|freqs_(?:cos|sin|cis)"),
    _rule(r"\w*(?:rope|rotary)\w*\.(?:cos|sin)|\w*(?:cos|sin)_cached"),
    _rule(r"\w*(?:rope|rotary)\w*\.(?:freqs|bands)|rope_freqs\.weight", _line, is_decreasing),
    # Buffers. A parameter is a weight, even one that is never trained and holds just this: the `pos_embed` of MAE, the
    # `embed_positions.weight` of Whisper and Marian. Others train under the same name, and no file tells which.
    _rule(r"pe|pos_enc(?:oding)?s?|position(?:al)?_encodings?|pos_table|sinusoid\w*", _table, is_sinusoidal),
    _rule(r"embed_positions\.weights|timing_signal|pos_?emb_?(?:sin|buffer)\w*", _table, is_sinusoidal),
    # boxes of detectors
    _rule("anchors", lambda shape: len(shape) >= 2 and shape[-1] in (2, 4)),
    _rule("anchor_grid"),
    _rule("strides?", lambda shape: len(shape) <= 2 and max(shape, default=1) <= SMALL),
    _rule(r"dfl\.(?:conv\.weight|proj)|integral\.project", _any, is_count),
    # images and sounds
    _rule("(?:pixel|image|img|input)_(?:mean|std)"),
    _rule(r"scaling_layer\.(?:shift|scale)"),
    _rule(r"resample_filter|filt|blur_kernel|blur\.kernel|(?:up|down)(?:sample)?_?filter|lowpass\.filter"),
    _rule(r"(?:up|down)sample\.filter"),
    _rule(r"mel_(?:fb|filters|basis|filterbank)|melW|mel_scale\.fb|featurizer\.fb|dct_mat"),
    _rule(r"\w*(?:spec|stft|mel|featurizer)\w*\.window|(?:hann|analysis|synthesis|stft|fft)_window", _line),
    _rule(r"\w*stft\w*\.(?:forward_basis|inverse_basis|(?:conv_)?(?:real|imag)\.weight)"),
    # noise schedules of diffusion models
    _rule("betas|alphas|sigmas|log_sigmas|lvlb_weights|p2_loss_weight|posterior_variance", _line),
    _rule(r"(?:sqrt_|log_)?(?:recip_|recipm1_|one_minus_)?alphas_cumprod(?:_prev|_next)?", _line),
    _rule("posterior_(?:log_variance_clipped|mean_coef[12])", _line),
    # losses, and what tells a module's device or version
    _rule("(?:empty|pos)_weight", lambda shape: len(shape) <= 1),
    _rule(r"(?:criterion|loss|loss_fn|loss_func)\.weight", _line),
    _rule(
        "_float_tensor|dummy_param|_?dummy|device_indicator_tensor|version", lambda shape: shape in ((), (0,), (1,))
    ),
)
