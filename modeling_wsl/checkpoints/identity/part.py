"""A tensor of a canonical view: stored, a slice of a stored one, or computed from several."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from ...tokens.manifest import TensorSpec


@dataclass(frozen=True)
class Part:
    """A tensor of the view.

    Attributes:
        spec: under its name in the view.
        read: gives it.
        place: of the first stored tensor that it is made of, among the checkpoint's.
    """

    spec: TensorSpec
    read: Callable[[], torch.Tensor]
    place: int

    def renamed(self, name: str) -> "Part":
        return Part(TensorSpec(name, self.spec.shape, self.spec.dtype), self.read, self.place)


class Held:
    """The value that was computed last: what is read window by window is not computed for each window."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._value: Any = None

    def get(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        if self._key != key:
            self._key = self._value = None  # let go of it before the next takes memory
            self._value = compute()
            self._key = key
        return self._value
