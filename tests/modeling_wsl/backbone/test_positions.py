import math

import pytest
import reference
import torch

from modeling_wsl import WSLConfig, WSLModel
from modeling_wsl.backbone.positions import (
    LearnedPositions,
    SinusoidalPositions,
    default_positions,
    sinusoidal_positions,
)


FAR = 5_600_000


def far_positions(count=64):
    generator = torch.Generator().manual_seed(0)
    n = torch.randint(0, FAR, (count,), generator=generator)
    n[:4] = torch.tensor([0, 1, FAR - 1, 2**24 + 1])
    l = torch.randint(0, 3000, (count,), generator=generator)
    k = torch.randint(0, 400_000, (count,), generator=generator)
    return torch.stack([n, l, k], dim=-1)[None]


def test_sinusoidal_positions_equal_the_naive_formula_at_millions_of_tokens():
    positions = far_positions()
    expected = reference.sinusoidal_positions(positions, 32)
    # Three summed sines: an angle that is off by 1e-3 rad moves one of them by at most 1e-3.
    torch.testing.assert_close(sinusoidal_positions(positions, 32).double(), expected, atol=3e-4, rtol=0)


@pytest.mark.parametrize("highest", [FAR, 2**31])
def test_no_angle_is_off_by_a_thousandth_of_a_radian(highest):
    n = torch.randint(0, highest, (1, 2000), generator=torch.Generator().manual_seed(1))
    n[0, 0] = highest - 1
    positions = torch.stack([n, torch.zeros_like(n), torch.zeros_like(n)], dim=-1)
    dim = 64
    encoding = sinusoidal_positions(positions, dim).double()
    sine, cosine = encoding[..., 0::2], encoding[..., 1::2] - 2  # two of the three cosines are cos(0)
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    error = torch.atan2(sine, cosine) - n.double()[..., None] * frequencies
    error = torch.remainder(error + math.pi, 2 * math.pi) - math.pi
    assert error.abs().max() < 1e-3


def test_the_angles_do_not_depend_on_the_models_dtype_or_on_autocast():
    positions = far_positions()
    expected = sinusoidal_positions(positions, 32)
    module = SinusoidalPositions(32).to(torch.bfloat16)
    assert torch.equal(module(positions), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(positions), expected)
    assert not list(module.buffers())
    assert not list(module.parameters())


def test_a_bfloat16_model_tells_distant_neighbors_apart():
    config = WSLConfig(token_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, latent_size=8)
    model = WSLModel(config).to(torch.bfloat16)
    positions = default_positions(1, 2) + torch.tensor([FAR, 0, 0])
    latents = model.encode(torch.zeros(1, 2, 8), positions=positions)
    assert not torch.equal(latents[0, 0], latents[0, 1])


def test_sinusoidal_positions_compile_into_one_graph():
    positions = far_positions()
    compiled = torch.compile(sinusoidal_positions, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(positions, 32), sinusoidal_positions(positions, 32))


def test_learned_positions_are_two_half_width_sums():
    module = LearnedPositions(8, [50, 5, 10])
    positions = torch.tensor([[[49, 4, 9], [0, 0, 0], [7, 2, 3]]])
    encoded = module(positions)
    for token, (n, l, k) in zip(encoded[0], positions[0].tolist(), strict=True):
        torch.testing.assert_close(token[:4], module.in_model.weight[n] + module.layer.weight[l])
        torch.testing.assert_close(token[4:], module.in_layer.weight[k])


@pytest.mark.parametrize(
    ("position", "name"),
    [([50, 0, 0], "n .*50 entries"), ([0, 5, 0], "l .*5 entries"), ([0, 0, 10], "k .*10"), ([-1, 0, 0], "n .*-1")],
)
def test_a_position_beyond_its_learned_table_is_refused_by_name(position, name):
    with pytest.raises(ValueError, match=name):
        LearnedPositions(8, [50, 5, 10])(torch.tensor([[position]]))


def test_positions_of_a_wrong_shape_or_type_are_refused():
    module = SinusoidalPositions(8)
    with pytest.raises(ValueError, match=r"\[batch, tokens, 3\].*\[4, 3\]"):
        module(torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="must be integers"):
        module(torch.zeros(1, 4, 3))


def test_default_positions_count_the_tokens_of_one_layer():
    assert default_positions(2, 3).tolist() == [[[0, 0, 0], [1, 0, 1], [2, 0, 2]]] * 2


def test_how_far_the_other_tokens_of_a_batch_lie_changes_no_encoding():
    # On a CPU, digits that all positions lack are left out.
    near = torch.randint(0, 200, (1, 32, 3), generator=torch.Generator().manual_seed(0))
    for far in (near + 300, near + 70_000, far_positions(32), near - 10**6):
        together = sinusoidal_positions(torch.cat([near, far]), 32)
        assert torch.equal(together[:1], sinusoidal_positions(near, 32))
