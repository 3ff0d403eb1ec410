"""Training of backbones."""
