"""Slow, readable versions of positions, losses and the transformer, to compare the library with.

Written from the paper's formulas with plain loops, in float64 where gradients are not compared in float32.
"""

import math

import torch


def sinusoidal_position(position: list[int], dim: int) -> list[float]:
    """One token's [n, l, k] -> dim numbers: the three encodings of Dosovitskiy/Vaswani, summed."""
    encoding = [0.0] * dim
    for coordinate in position:
        for i in range(dim // 2):
            angle = coordinate / 10000.0 ** (2 * i / dim)
            encoding[2 * i] += math.sin(angle)
            encoding[2 * i + 1] += math.cos(angle)
    return encoding


def sinusoidal_positions(positions: torch.Tensor, dim: int) -> torch.Tensor:
    rows = [[sinusoidal_position(token, dim) for token in window] for window in positions.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def _moments(entries: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.stack(entries).detach()
    mean = values.sum() / len(values)
    return mean, (((values - mean) ** 2).sum() / len(values)).sqrt()


def reconstruction_loss(
    reconstruction: torch.Tensor,
    tokens: torch.Tensor,
    token_mask: torch.Tensor,
    positions: torch.Tensor,
    normalization: str,
    mask_padding: bool,
    eps: float = 1e-4,
) -> torch.Tensor:
    """Equation 1 of the paper entry by entry: both sides normalised, then squared and averaged."""
    groups: dict[tuple, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    batch, num_tokens, token_size = tokens.shape
    for b in range(batch):
        for t in range(num_tokens):
            if not token_mask[b, t].any():
                continue
            for d in range(token_size):
                valid = bool(token_mask[b, t, d])
                if mask_padding and not valid:
                    continue
                layer = int(positions[b, t, 1])
                key = {"none": (), "batch": (), "window": (b,), "layer": (b, layer), "token": (b, t)}[normalization]
                target = tokens[b, t, d] if valid else torch.zeros((), dtype=tokens.dtype)
                groups.setdefault(key, []).append((target, reconstruction[b, t, d]))
    errors = []
    for pairs in groups.values():
        if normalization == "none":
            errors += [(predicted - target) ** 2 for target, predicted in pairs]
            continue
        mean, std = _moments([target for target, _ in pairs])
        if len(pairs) < 2 or std < 1e-8:
            continue
        for target, predicted in pairs:
            errors.append(((predicted - mean) / (std + eps) - (target - mean) / (std + eps)) ** 2)
    return torch.stack(errors).mean()


def nt_xent(projections: torch.Tensor, temperature: float) -> torch.Tensor:
    """SimCLR's equation 1, view by view."""
    rows = len(projections)
    losses = []
    for i in range(rows):
        partner = (i + rows // 2) % rows

        def similarity(j, i=i):
            a, b = projections[i], projections[j]
            return torch.exp((a @ b) / (a.norm() * b.norm()) / temperature)

        losses.append(-torch.log(similarity(partner) / sum(similarity(j) for j in range(rows) if j != i)))
    return torch.stack(losses).mean()


def reconstruction_r2(reconstruction, tokens, token_mask, standardize="token") -> float:
    residual = total = 0.0
    windows = zip(reconstruction.double(), tokens.double(), token_mask, strict=True)
    for predicted_window, window, mask_window in windows:
        for predicted, token, mask in zip(predicted_window, window, mask_window, strict=True):
            values = token[mask]
            if len(values) < 2 or values.std(unbiased=False) < 1e-8:
                continue
            sigma = values.std(unbiased=False) if standardize == "token" else 1.0
            residual += (((predicted[mask] - values) / sigma) ** 2).sum().item()
            total += (((values - values.mean()) / sigma) ** 2).sum().item()
    return 1 - residual / total


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean) ** 2).mean(-1, keepdim=True).add(eps).sqrt() * weight


def _transformer(stack, features: torch.Tensor, positions: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """One stack on one window: features [tokens, in], positions [tokens, d], attended [tokens] -> [tokens, out].

    Takes the parameters from `stack` and nothing else.
    """
    config = stack.config
    head_dim = config.hidden_size // config.num_attention_heads
    hidden = features @ stack.proj_in.weight.T + stack.proj_in.bias + positions
    for layer in stack.layers:
        attention = layer.attention
        normed = _layer_norm(hidden, layer.attention_norm.weight, config.layer_norm_eps)
        heads = []
        for h in range(config.num_attention_heads):
            part = slice(h * head_dim, (h + 1) * head_dim)
            query = normed @ attention.q_proj.weight[part].T
            key = normed @ attention.k_proj.weight[part].T
            value = normed @ attention.v_proj.weight[part].T
            rows = []
            for t in range(len(hidden)):
                scores = key @ query[t] / math.sqrt(head_dim)
                weights = torch.where(attended, scores, -torch.inf).softmax(-1)
                rows.append(weights @ value)
            heads.append(torch.stack(rows))
        hidden = hidden + torch.cat(heads, -1) @ attention.o_proj.weight.T
        normed = _layer_norm(hidden, layer.mlp_norm.weight, config.layer_norm_eps)
        up = normed @ layer.mlp.up_proj.weight.T
        gelu = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
        hidden = hidden + gelu @ layer.mlp.down_proj.weight.T
    return hidden @ stack.proj_out.weight.T + stack.proj_out.bias


def _position_vectors(model, window: torch.Tensor) -> torch.Tensor:
    config = model.config
    if config.position_encoding == "sinusoidal":
        return sinusoidal_positions(window[None], config.hidden_size)[0].float()
    tables = model.positions
    rows = []
    for n, l, k in window.tolist():
        rows.append(torch.cat([tables.in_model.weight[n] + tables.layer.weight[l], tables.in_layer.weight[k]]))
    return torch.stack(rows)


def autoencode(model, tokens: torch.Tensor, token_mask: torch.Tensor, positions: torch.Tensor):
    """`WSLModel` window by window -> latents [batch, tokens, latent], reconstruction [batch, tokens, d_t]."""
    config = model.config
    all_latents, all_reconstructions = [], []
    for window, mask, position in zip(tokens, token_mask, positions, strict=True):
        attended = mask.any(-1)
        embedded = _position_vectors(model, position)
        rows, statistics = [], []
        for token, valid in zip(window, mask, strict=True):
            row = torch.where(valid, token, 0)
            mean, std = torch.zeros(()), torch.tensor(1e-8)
            if valid.any():
                mean = token[valid].mean()
                std = token[valid].var(unbiased=False).clamp_min(1e-16).sqrt()
            if config.token_standardization:
                row = torch.where(valid, (token - mean) / std, 0)
            rows.append(row)
            statistics.append(torch.stack([mean, std.log()]))
        features = torch.stack(rows)
        latents = _transformer(model.encoder, features, embedded, attended)
        if config.linear_path:
            latents = latents + features @ model.linear_encoder.weight.T + model.linear_encoder.bias
        content = decoder_features = latents
        if config.token_standardization:
            means, log_stds = torch.stack(statistics).split(1, dim=-1)
            latents = torch.cat([content, means, log_stds], dim=-1)
            decoder_features = torch.cat([content, torch.asinh(means), log_stds], dim=-1)
        reconstruction = _transformer(model.decoder, decoder_features, embedded, attended)
        if config.linear_path:
            reconstruction = reconstruction + content @ model.linear_decoder.weight.T + model.linear_decoder.bias
        if config.token_standardization:
            reconstruction = reconstruction * log_stds.exp() + means
        all_latents.append(latents)
        all_reconstructions.append(reconstruction)
    return torch.stack(all_latents), torch.stack(all_reconstructions)
