"""The dataset card: facts, composition, sections."""
