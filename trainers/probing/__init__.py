"""What a model's weights tell of its properties: probes on embeddings, beside baselines (paper, Table 9)."""
