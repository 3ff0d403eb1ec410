"""Finding models by their weights: neighbours in a table of embeddings, copies, and who was fine-tuned from whom."""
