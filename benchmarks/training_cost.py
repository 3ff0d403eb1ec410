"""What training a code costs: floating-point operations, by configuration and facts of the run, and seconds."""

from typing import Any

from modeling_wsl import WSLConfig
from modeling_wsl.codes.registry import code_of
from trainers.data.windows.window_data import WindowDataset


PASSES = 3  # a backward pass computes two products for each of the forward pass
VIEWS = 2  # of every window, both go through the model


def forward_operations(config: WSLConfig, tokens: int) -> int:
    """Of the matmuls and attention of `WSLForPreTraining` for one window; a multiply-add counts as two.

    The factors of the matrix code itself, eigenvectors on the CPU, are not counted.
    """
    width, inner, latent = config.hidden_size, config.intermediate_size, config.latent_size
    content = latent - config.num_token_statistics
    into_decoder = code_of(config).decoder_size
    block = tokens * (4 * width * width + 2 * width * inner) + 2 * tokens * tokens * width
    ends = (config.token_size + content) * width + (into_decoder + config.token_size) * width
    linear = 2 * config.token_size * content if config.linear_path else 0
    into_head = latent if config.projection == "pooled" else config.window_size * latent
    head = (into_head + config.projection_size) * config.projection_size
    return 2 * (2 * config.num_hidden_layers * block + tokens * (ends + linear) + head)


def training_cost(facts: dict[str, Any], config: WSLConfig) -> dict[str, Any]:
    """Operations of a whole run, as if its tokens with weights had come in full windows, and what it ran on.

    Args:
        facts: content of training_facts.json.
    """
    windows = facts["tokens_seen"] / config.window_size
    kept = ("status", "size", "parameters", "steps", "tokens_seen", "train_tokens", "seconds", "device", "processes")
    return {
        "operations": PASSES * VIEWS * windows * forward_operations(config, config.window_size),
        **{name: facts[name] for name in kept},
    }


def pca_cost(train: WindowDataset, max_tokens: int, seconds: float) -> dict[str, Any]:
    """Of the sum of outer products; the eigenvectors of one small matrix are not counted."""
    total = int(train.num_tokens.sum())
    tokens = -(-total // max(1, -(-total // max_tokens)))  # every so-manieth, as `WindowDataset.sample` takes them
    return {"operations": 2 * tokens * train.token_size**2, "tokens_seen": tokens, "seconds": seconds}
