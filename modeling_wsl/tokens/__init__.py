"""Weights to tokens and back: which tensor lies where."""
