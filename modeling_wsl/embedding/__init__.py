"""The embedding of a whole model."""
