"""Which dimension of a weight counts its outputs, as far as its name tells."""

from modeling_wsl.tokens.manifest import split_name


OUTPUT_LAST = ("kernel", "recurrent_kernel")  # leaf names of Keras, TensorFlow and Flax


def is_output_last(name: str) -> bool:
    """Whether the last dimension of a tensor of this name counts outputs, and not the first."""
    return split_name(name)[1] in OUTPUT_LAST
