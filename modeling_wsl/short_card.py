"""The card of a backbone that is pushed without more being known of it than its configuration."""

from string import Template

from huggingface_hub import ModelCard, ModelCardData

from .card_signature import signed
from .configuration_wsl import WSLConfig


TEXT = Template("""
# $repo_id

A backbone for [weight-space learning](https://arxiv.org/abs/2510.02096): a transformer whose input is the weights of
neural networks. It has $parameters parameters ($layers layers on each side, width $width), reads windows of $window
tokens of $token_size weights, and turns them into $latent_size numbers a token and those back into weights.

```python
from transformers import AutoModel, pipeline

# trust_remote_code runs the code of this repository; with hf-wsl installed and imported, leave it out
model = AutoModel.from_pretrained("$repo_id", trust_remote_code=True)
embedder = pipeline("weight-embedding", model="$repo_id", trust_remote_code=True)
embedding = embedder("timm/resnet18.a1_in1k")["embedding"]
```

What it was trained on and how well it does is not recorded here: it was pushed from Python. `hf-wsl publish` writes a
card with training facts, evaluation and licenses.
""")


def short_card(repo_id: str, config: WSLConfig, num_parameters: int) -> str:
    """README.md with what the configuration tells, and nothing to be filled in."""
    text = TEXT.substitute(
        repo_id=repo_id,
        parameters=f"{num_parameters:,}",
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        window=config.window_size,
        token_size=config.token_size,
        latent_size=config.latent_size,
    )
    data = ModelCardData(library_name="transformers", tags=["weight-space-learning", "hf-wsl"])
    return signed(
        str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))
    )  # as the client writes a card that it has read
