"""Several members of a lab zoo as one model: their parameters in one matrix, their logits in one computation."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from .members import Member
from .small_cnn import SmallCNN, stacked_logits


class Stack:
    """M networks of one structure. What a member does depends on its own settings alone, beyond float rounding.

    Small CNNs are computed together. A network of timm is computed by itself: batch norms keep statistics while they
    are trained, and its dropout is drawn inside it.

    Args:
        networks: of the members, in their order.
        members: one network alone where it is no `SmallCNN`.

    Attributes:
        parameters: float32 `[M, P]`, a leaf that requires gradients.
    """

    def __init__(self, networks: Sequence[nn.Module], members: Sequence[Member]) -> None:
        self.members, self.network = tuple(members), networks[0]
        self.together = isinstance(self.network, SmallCNN)
        stacked, _ = stack_module_state(list(networks))
        self.shapes = {name: tensor.shape[1:] for name, tensor in stacked.items()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.parameters = torch.cat([tensor.detach().flatten(1) for tensor in stacked.values()], 1).requires_grad_()
        self.generators = [torch.Generator().manual_seed(member.seed) for member in members]

    def logits(self, images: Tensor, step: int | None = None) -> Tensor:
        """`[M, B, classes]`.

        Args:
            images: `[M, B, C, S, S]`, or `[B, C, S, S]` where all members see the same ones.
            step: of the training, whose dropout and batch statistics are used; None: as in evaluation.
        """
        parts = self.parameters.split(self.sizes, 1)
        named = {
            name: part.unflatten(1, shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        if self.together:
            dropouts = None if step is None else self._dropouts(images.shape[-4])
            return stacked_logits(named, self.network.act, images, dropouts)
        self.network.train(step is not None)
        own = {name: tensor[0] for name, tensor in named.items()}
        with torch.random.fork_rng(devices=[]):
            if step is not None:
                seed = np.random.SeedSequence((self.members[0].seed, step)).generate_state(1)
                torch.manual_seed(int(seed[0]))
            return functional_call(self.network, own, (images.flatten(0, -4),))[None]

    def _dropouts(self, batch: int) -> tuple[Tensor, Tensor] | None:
        """The factors of the inputs of the linear layers, drawn by each member's own generator."""
        if not self.members[0].dropout:
            return None
        widths = [self.network.fc1.in_features, self.network.fc2.in_features]
        keep = torch.tensor([1 - member.dropout for member in self.members])[:, None, None]
        draws = [torch.rand(batch, sum(widths), generator=generator) for generator in self.generators]
        first, second = ((torch.stack(draws) < keep) / keep).split(widths, 2)
        return first, second

    @torch.no_grad()
    def network_of(self, index: int) -> nn.Module:
        """A member's network in its present state; the next call overwrites it."""
        own = self.parameters[index].split(self.sizes)
        for (name, shape), values in zip(self.shapes.items(), own, strict=True):
            self.network.get_parameter(name).copy_(values.view(shape))
        return self.network
