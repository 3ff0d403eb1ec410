"""Some methods put the numbers of tensors side by side: only models of one architecture have comparable vectors."""

from modeling_wsl.tokens.manifest import WeightManifest


def tensor_shapes(manifest: WeightManifest) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tokenized tensor, in order."""
    return {spec.name: spec.shape for layer in manifest.layers for spec in layer.tensors}


class SameTensors:
    """Refuses a model whose tensors are not those of the first that was kept.

    Args:
        what: needs it, for the message.
        instead: what does not.
    """

    def __init__(self, what: str, instead: str):
        self.what, self.instead = what, instead
        self.first: tuple[str, dict[str, tuple[int, ...]]] | None = None

    def check(self, name: str, manifest: WeightManifest) -> None:
        """Raises ValueError, naming both models and the first tensor that differs."""
        if self.first is None:
            return
        shapes, (first, expected) = tensor_shapes(manifest), self.first
        if list(shapes.items()) != list(expected.items()):
            names = dict.fromkeys([*expected, *shapes])
            differs = next((tensor for tensor in names if shapes.get(tensor) != expected.get(tensor)), None)
            found = f"{differs} is {_shape(shapes, differs)} there and {_shape(expected, differs)} here"
            raise ValueError(
                f"{self.what} needs models with the same tensors, and {name} is not like {first}: "
                f"{found if differs else 'their order differs'}. Leave it out, or use {self.instead}."
            )

    def keep(self, name: str, manifest: WeightManifest) -> None:
        """To be called once a model has been read to its end: the first such is what others are compared with."""
        if self.first is None:
            self.first = (name, tensor_shapes(manifest))


def _shape(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "missing"
