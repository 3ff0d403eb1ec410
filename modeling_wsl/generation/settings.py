"""The settings of a generation, and the paper's two protocols."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from ..backbone.inference import PRECISIONS
from ..tokens.manifest import check_choice
from .ranking import Scorer


METHODS = ("density", "interpolation")


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of a generation.

    Attributes:
        num_samples: models to return.
        num_candidates: models to draw, of which the best `num_samples` are kept; needs `rank`. None: `num_samples`.
        method: "density" (a kernel density on the anchors' latents) or "interpolation" (points of the straight line
            between the latents of two anchors). None: "density".
        seed: of all randomness; the same seed gives the same bytes on the same machine.
        bandwidth, noise: of the density, see `sample_latents`. noise None: "shared" for latents of tokens; for factors
            of matrices "independent", because one vector for all tokens would repeat within their matrices.
        interpolation_ends: whether the line's ends, the anchors themselves, are among the points.
        bootstrap_rounds: how often the latents of the best `num_samples` of a round become the anchors of another
            round of `num_candidates` draws (SANE's bootstrapped sampling); needs `rank`.
        window_size, halo: see `HaloedWindows`. window_size None: the window that the backbone was trained on.
        batch_size: windows per forward pass of the backbone.
        precision: "float32", "bfloat16", or "auto", the default: for a backbone stored in bfloat16, on a CPU, the
            faster of the two; others run in the dtype of their weights.
        autocast_dtype: run the backbone under autocast to this type ("bfloat16"), whatever `precision` says.
        batch_norm_images: images for `reestimate_batch_norm`; None: the first anchor's statistics are inherited.
        rank: a function module -> score, higher is better, or a loader of validation data `(images, labels)`; never
            test data.
        progress: show progress bars (transformers' switch turns them off too).

    Raises:
        ValueError: for an impossible combination, saying which.
    """

    num_samples: int = 1
    num_candidates: int | None = None
    method: str | None = None
    seed: int = 0
    bandwidth: float = 0.2
    noise: str | None = None
    interpolation_ends: bool = False
    bootstrap_rounds: int = 0
    window_size: int | None = None
    halo: int = 64
    batch_size: int = 8
    autocast_dtype: torch.dtype | str | None = None
    precision: str = "auto"
    batch_norm_images: Tensor | Iterable[Any] | None = field(default=None, repr=False)
    rank: Scorer | Iterable[Any] | None = field(default=None, repr=False)
    progress: bool = True

    def __post_init__(self):
        if self.noise is not None:
            check_choice("noise", self.noise, ("shared", "independent"))
        if self.method is not None:
            check_choice("method", self.method, METHODS)
        check_choice("precision", self.precision, PRECISIONS)
        if isinstance(self.autocast_dtype, str):
            check_choice("autocast_dtype", self.autocast_dtype, ("bfloat16", "float16"))
        if self.halo < 0:
            raise ValueError(f"halo is {self.halo}; give 0 for windows without context, or a positive number.")
        for option in ("num_samples", "batch_size", "window_size"):
            if getattr(self, option) is not None and getattr(self, option) < 1:
                raise ValueError(f"{option} is {getattr(self, option)}; it must be at least 1.")
        if not 0 <= self.bandwidth < float("inf"):
            raise ValueError(f"bandwidth is {self.bandwidth}; it is a standard deviation: give 0 (no noise) or more.")
        if self.bootstrap_rounds < 0:
            raise ValueError(f"bootstrap_rounds is {self.bootstrap_rounds}; give 0 (none) or more.")
        for option in ("num_candidates", "bootstrap_rounds"):
            if getattr(self, option) and self.rank is None:
                raise ValueError(
                    f"{option}={getattr(self, option)} needs rank=<validation loader or function>: without it nothing "
                    "tells which of them to keep."
                )
        if self.num_candidates is not None and self.num_candidates < self.num_samples:
            raise ValueError(f"num_candidates={self.num_candidates} is below num_samples={self.num_samples}.")
        for option in ("batch_norm_images", "rank"):
            if self.total_draws > 1 and isinstance(getattr(self, option), Iterator):
                raise ValueError(
                    f"{option} is an iterator: it would be used up by the first of {self.total_draws} models. Give "
                    "a list or a DataLoader."
                )

    @property
    def num_draws(self) -> int:
        return self.num_candidates or self.num_samples

    @property
    def total_draws(self) -> int:
        """Of all rounds."""
        return self.num_draws * (self.bootstrap_rounds + 1)

    @classmethod
    def few_shot(cls, **more: Any) -> Self:
        """The paper's protocol for models without fine-tuning: draw 50 around 5 anchors, keep 10 (appendix C.2).

        Args:
            more: `rank`, which it needs, and anything else.
        """
        return cls(**{"num_samples": 10, "num_candidates": 50, **more})

    @classmethod
    def init(cls, **more: Any) -> Self:
        """The paper's protocol for an initialization: draw 5 around 1 anchor, keep the best (appendix C.2).

        Args:
            more: `rank`, which it needs, and anything else.
        """
        return cls(**{"num_samples": 1, "num_candidates": 5, **more})

    def method_for(self, num_anchors: int) -> str:
        """The `method` that these settings mean, with so many anchors.

        Raises:
            ValueError: the method needs another number of them, or does without rounds.
        """
        method = self.method or "density"
        if num_anchors == 0:
            raise ValueError("anchors is empty: give one trained model or more to take weights from.")
        if method == "interpolation" and num_anchors != 2:
            raise ValueError(f"method='interpolation' goes from one anchor to another: give two, not {num_anchors}.")
        if method != "density" and self.bootstrap_rounds:
            raise ValueError(f"bootstrap_rounds={self.bootstrap_rounds} needs method='density', not {method!r}.")
        if method == "interpolation" and self.interpolation_ends and self.num_draws < 2:
            raise ValueError("interpolation_ends: a line has two ends, so num_samples must be at least 2.")
        return method
