"""Weights that a file stores as something else: codes with scales, recognized and dequantized while they are read."""
