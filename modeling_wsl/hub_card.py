"""The signature of the cards that hf-wsl writes, and the card of a backbone that is pushed from Python."""

import re
from string import Template

from .files import sha256


SIGNATURE = re.compile(r"\n<!-- hf-wsl card ([0-9a-f]{16}): .*-->\n\Z")

# As the Hub's client writes a card that it has read. `hf-wsl publish` replaces it by one with training facts.
BACKBONE_CARD = Template("""---
library_name: transformers
tags:
- weight-space-learning
- hf-wsl
---

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


def signed(card: str) -> str:
    """Appends a hash of the card, by which `is_ours` tells whether anyone has changed it since."""
    mark = sha256(card)[:16]
    return (
        f"{card}\n<!-- hf-wsl card {mark}: written by hf-wsl; once you change anything above, it stays as it is -->\n"
    )


def is_ours(card: str) -> bool:
    """Whether this package wrote the card and nobody has changed it."""
    match = SIGNATURE.search(card)
    return match is not None and signed(card[: match.start()]) == card
