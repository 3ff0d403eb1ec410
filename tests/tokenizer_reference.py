"""The tokenizer as one would explain it: loops over layers, rows and tokens (paper, section 3.3, appendix B.2.1)."""

import torch


def tokenize_naively(state: dict[str, torch.Tensor], tokenization: str, token_size: int):
    """Tokens `[T, d_t]`, mask `[T, d_t]` and positions `[T, 3]` of a state dict with torch's names."""
    layers: dict[str, list[str]] = {}
    for name, tensor in state.items():
        module = name.rpartition(".")[0]
        batch_norm = f"{module}.running_mean" in state and name.rpartition(".")[2].startswith(
            ("running_", "num_batches")
        )
        if tensor.is_floating_point() and tensor.numel() and not batch_norm:
            layers.setdefault(module, []).append(name)

    tokens, masks, positions = [], [], []
    for layer_index, names in enumerate(layers.values()):
        index_in_layer = 0
        for vector in vectors_of_layer(state, names, tokenization):
            for start in range(0, len(vector), token_size):
                piece = vector[start : start + token_size]
                tokens.append(piece + [0.0] * (token_size - len(piece)))
                masks.append([True] * len(piece) + [False] * (token_size - len(piece)))
                positions.append([len(positions), layer_index, index_in_layer])
                index_in_layer += 1
    return torch.tensor(tokens), torch.tensor(masks), torch.tensor(positions)


def vectors_of_layer(state: dict[str, torch.Tensor], names: list[str], tokenization: str) -> list[list[float]]:
    """What is cut into tokens and padded at its end: the whole layer (dense), or each output row (sparse)."""
    if tokenization == "dense":
        return [[value for name in names for value in state[name].flatten().tolist()]]
    rows, used = [], set()
    for name in names:
        if name in used:
            continue
        weight = state[name]
        bias = state.get(name.replace("weight", "bias")) if name.endswith("weight") else None
        pairs = bias is not None and weight.dim() > 0 and tuple(bias.shape) == tuple(weight.shape[:1])
        if name.endswith("bias"):
            partner = state.get(name[: -len("bias")] + "weight")
            if partner is not None and partner.dim() > 0 and tuple(partner.shape[:1]) == tuple(weight.shape):
                continue  # it is appended to its weight's rows
        for row in range(weight.shape[0] if weight.dim() else 1):
            values = (weight[row] if weight.dim() else weight).flatten().tolist()
            rows.append(values + ([bias[row].item()] if pairs else []))
    return rows
