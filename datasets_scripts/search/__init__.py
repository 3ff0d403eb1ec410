"""Finding models by their weights: neighbors in a table of embeddings, copies, and who was fine-tuned from whom."""
