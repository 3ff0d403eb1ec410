"""Statistics of a tensor that is read in pieces are those of the whole tensor."""

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis

from datasets_scripts.inspection import tensor_statistics as module
from datasets_scripts.inspection.tensor_statistics import tensor_statistics


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(40, 3, 5, 5), (1, 700), (700,), (9, 8)])
def test_moments_are_those_of_the_whole_tensor(dtype, shape):
    tensor = (3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    tensor.view(-1)[7] = 0
    values = tensor.double().numpy().ravel()
    found = tensor_statistics(tensor)
    assert found.mean == pytest.approx(values.mean(), rel=1e-9)
    assert found.std == pytest.approx(values.std(), rel=1e-9)
    assert found.kurtosis == pytest.approx(kurtosis(values, fisher=False), rel=1e-9)
    assert found.norm == pytest.approx(np.linalg.norm(values), rel=1e-9)
    assert (found.minimum, found.maximum) == (values.min(), values.max())
    assert found.sparsity == pytest.approx((values == 0).mean())
    assert sum(found.histogram.counts) + found.histogram.outside == tensor.numel()


@pytest.mark.parametrize("shape", [(30, 12), (12, 300), (200, 150), (80, 4, 3, 3)])
def test_the_spectral_norm_is_the_largest_singular_value(shape):
    tensor = 1e-20 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    singular = torch.linalg.svdvals(tensor.flatten(1))
    found = tensor_statistics(tensor).spectrum
    assert found.spectral_norm == pytest.approx(float(singular[0]), rel=2e-3)
    assert found.stable_rank == pytest.approx(float(singular.square().sum() / singular[0] ** 2), rel=4e-3)
    assert (found.smaller_side, found.sampled_rows) == (min(tensor.flatten(1).shape), None)


def test_a_large_tensor_is_sampled_and_says_so(monkeypatch):
    monkeypatch.setattr(module, "MAX_SPECTRUM_ENTRIES", 2000)
    monkeypatch.setattr(module, "MAX_HISTOGRAM_ENTRIES", 3000)
    tensor = torch.randn(500, 20, generator=torch.Generator().manual_seed(2))
    found = tensor_statistics(tensor)
    assert found.spectrum.sampled_rows == 100
    assert found.spectrum.spectral_norm <= float(torch.linalg.svdvals(tensor)[0]) * (1 + 1e-6)
    assert found.histogram.step == 4
    assert sum(found.histogram.counts) + found.histogram.outside == 2500


def test_entries_that_are_not_finite_are_counted_and_left_out():
    tensor = torch.randn(20, 30)
    tensor[3, 4], tensor[5, 6], tensor[7, 8] = float("nan"), float("inf"), float("-inf")
    found = tensor_statistics(tensor)
    finite = tensor[tensor.isfinite()].double()
    assert (found.nan, found.infinite, found.spectrum) == (1, 2, None)
    assert found.mean == pytest.approx(float(finite.mean())) and found.std == pytest.approx(float(finite.std(False)))
    nothing = tensor_statistics(torch.full((4, 4), float("nan")))
    assert (nothing.nan, nothing.mean, nothing.histogram) == (16, None, None)


def test_outputs_are_the_first_dimension_or_in_keras_the_last():
    kernel = torch.randn(3, 3, 4, 6)
    kernel[..., 2] = 0
    assert tensor_statistics(kernel).dead_outputs == 0
    found = tensor_statistics(kernel, output_last=True)
    assert (found.dead_outputs, found.outputs) == (1, 6)
    assert tensor_statistics(kernel.permute(3, 0, 1, 2)).dead_outputs == 1


def test_a_constant_tensor_has_no_spread_and_no_kurtosis():
    for value in (0.0, 0.1):
        found = tensor_statistics(torch.full((37, 11), value))
        assert (found.std, found.kurtosis, found.histogram) == (0.0, None, None)
    assert tensor_statistics(torch.tensor(0.5)).mean == 0.5
    assert tensor_statistics(torch.zeros(5, 5)).spectrum is None


def test_entries_near_the_end_of_the_number_range_overflow_nothing():
    found = tensor_statistics(torch.tensor([[1e200, -1e200, 3e199], [1e-200, 0.0, 5e199]], dtype=torch.float64))
    assert 1 < found.kurtosis < 6 and found.std == pytest.approx(6e199, rel=0.2)
    assert found.spectrum.spectral_norm == pytest.approx(1.45e200, rel=0.1)
