"""What is odd about a model's batch norms: running statistics that were never set, or that no channel can have."""

from collections.abc import Iterator

from torch import Tensor

from modeling_wsl.checkpoints.checkpoint import Checkpoint
from modeling_wsl.tokens.manifest import BATCH_NORM_STATISTICS, split_name

from .findings import MAX_FLOAT16


# A channel whose input varies by less was constant: its output is noise once divided by the root of this.
MIN_VARIANCE = 1e-10
MIN_SCALE = 1e-4  # of a channel, beside the median of its norm: what passes is next to nothing
SCALES = ("weight", "gamma", "scale")


def batch_norm_oddities(checkpoint: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """(severity, what, where) about every module with a running mean, for `gather`.

    Args:
        checkpoint: open; of each batch norm a few tensors of one number a channel are read.
    """
    for name in checkpoint.tensors:
        prefix, leaf = split_name(name)
        if leaf not in BATCH_NORM_STATISTICS:
            continue
        module = name[: len(name) - len(leaf)]
        variance_leaf, *counter_leaf = BATCH_NORM_STATISTICS[leaf][1:]
        mean = checkpoint.read(name).double()
        if module + variance_leaf in checkpoint.tensors:
            variance = checkpoint.read(module + variance_leaf).double()
            yield from _statistics_oddities(prefix, mean, variance)
        for counter in counter_leaf:
            if module + counter in checkpoint.tensors and mean.any() and not checkpoint.read(module + counter).any():
                yield "notable", "num_batches_tracked is 0 beside running statistics that were set", prefix
        for scale_name in (module + scale for scale in SCALES):
            if scale_name in checkpoint.tensors:
                scale = checkpoint.read(scale_name).double().abs()
                off = int((scale <= MIN_SCALE * scale.median()).sum()) if scale.numel() else 0
                if off and scale.any():  # a tensor of zeros is told as such
                    what = "scales of a batch norm that are next to 0: channels that are off"
                    yield "notable", what, f"{prefix} ({off:,} of {scale.numel():,})"


def _statistics_oddities(prefix: str, mean: Tensor, variance: Tensor) -> Iterator[tuple[str, str, str]]:
    if not variance.numel():
        return
    broken = ~(mean.isfinite() & variance.isfinite()) if mean.shape == variance.shape else ~variance.isfinite()
    still = (variance >= 0) & (variance < MIN_VARIANCE)
    for severity, what, channels in (
        ("damage", "running statistics of a batch norm that are NaN or infinite", broken),
        ("damage", "negative running variances", variance < 0),
        ("notable", f"running variances below {MIN_VARIANCE:g}: channels whose input was constant", still),
    ):
        if channels.any():
            yield severity, what, f"{prefix} ({int(channels.sum()):,} of {channels.numel():,})"
    largest = float(variance[variance.isfinite()].max()) if variance.isfinite().any() else 0.0
    if largest > MAX_FLOAT16:
        yield "notable", "running variances that do not fit float16", f"{prefix} ({largest:.3g})"
    if not mean.any() and bool((variance == 1).all()):
        yield "notable", "running statistics as initialized: it never saw data in training mode", prefix
