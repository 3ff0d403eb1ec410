"""Fine-tuning and measuring of models."""
