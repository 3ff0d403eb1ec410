"""Weights against every control: arms, fine-tuning curves, the report of an evaluation."""
