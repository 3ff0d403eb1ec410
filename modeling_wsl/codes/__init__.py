"""The kinds of latents: what the numbers of a window stand for."""
