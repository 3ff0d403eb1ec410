"""The parts of the canonical view: names, and tensors that are stored in several ways."""
