"""The contents that every kind of file gives, whatever it is."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ...tokens.manifest import TensorSpec


@dataclass
class Contents:
    """The contents of files or of an object, before their tensors are put into order.

    Attributes:
        specs: every name, tied ones too, in the order found.
        read: name of a stored tensor -> its data.
        owners: alias -> the name under which `read` has it.
        metadata: `__metadata__` of safetensors files.
        in_state_dict_order: the order found is the state dict's.
        nested: the state dict was found inside a larger checkpoint.
        stored_as: name of a stored tensor -> how the file stores it, where that is not the tensor itself
            ("gptq, 4 bits, groups of 128"). `specs` and `read` have the dequantized tensor.
        layouts: name of a stored tensor -> the axes with which `permute` gives it the layout that the file has:
            (1, 0) for a file's `[in, out]`. `specs` and `read` have `[out, in, ...]`.
        constants: stored tensors that the architecture computes (causal masks, rotary tables): not weights.
        ignored: what the file holds beside the weights and was not read, one line each.
        close: lets go of mapped files.
    """

    specs: dict[str, TensorSpec]
    read: Callable[[str], torch.Tensor]
    owners: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    in_state_dict_order: bool = True
    nested: bool = False
    stored_as: dict[str, str] = field(default_factory=dict)
    layouts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    ignored: list[str] = field(default_factory=list)
    close: Callable[[], None] = lambda: None

    @property
    def listed(self) -> list[str]:
        """The names that the file itself lists; aliases in the metadata of a safetensors file are not."""
        return [name for name in self.specs if self.in_state_dict_order or name not in self.owners]
