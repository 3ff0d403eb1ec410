"""Reads the weights of a model, whatever holds them."""
