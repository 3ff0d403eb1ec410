"""Properties of models, read off their weights: probes on embeddings, beside baselines (paper, Table 9)."""
