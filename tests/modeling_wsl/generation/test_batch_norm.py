import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from modeling_wsl.generation.batch_norm import reestimate_batch_norm


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=None)
    )


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(21, 3, 9, 9, generator=torch.Generator().manual_seed(1)) * 2 + 3


def test_statistics_are_the_weighted_mean_over_batches_each_layer_seeing_normalized_inputs(net, images):
    names, seen = reestimate_batch_norm(net, DataLoader(TensorDataset(images), batch_size=8))  # 8, 8 and 5 images
    means, variances = [0, 0], [0, 0]
    for batch in images.split(8):
        first = net[0](batch)
        scale = first.var((0, 2, 3), unbiased=False, keepdim=True) + net[1].eps
        normalized = (first - first.mean((0, 2, 3), keepdim=True)) / scale.sqrt()
        for index, hidden in enumerate((first, net[3](normalized))):
            means[index] += hidden.mean((0, 2, 3)) * len(batch) / 21
            variances[index] += hidden.var((0, 2, 3)) * len(batch) / 21
    for index, norm in enumerate((net[1], net[4])):
        torch.testing.assert_close(norm.running_mean, means[index], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(norm.running_var, variances[index], atol=1e-5, rtol=1e-4)
    assert [name for name in net.state_dict() if "running" in name or "tracked" in name] == names


def test_one_batch_gives_the_statistics_of_the_data_and_forgets_the_old_ones(net, images):
    net[1].running_mean.fill_(1e6)
    reestimate_batch_norm(net, images, batch_size=64)
    hidden = net[0](images)
    torch.testing.assert_close(net[1].running_mean, hidden.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net[1].running_var, hidden.var((0, 2, 3)), atol=1e-4, rtol=1e-4)


def test_a_tensor_is_cut_into_equal_batches_so_that_no_batch_is_a_single_image(net, images):
    sizes = []
    net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    reestimate_batch_norm(net, images, batch_size=20)
    assert sizes == [11, 10]


def test_modes_momenta_and_weights_are_as_before(net, images):
    net.train()
    net[3].eval()
    weights = {name: value.clone() for name, value in net.named_parameters()}
    modes = [module.training for module in net.modules()]
    reestimate_batch_norm(net, images)
    assert [module.training for module in net.modules()] == modes
    assert (net[1].momentum, net[4].momentum) == (0.1, None)
    for name, value in net.named_parameters():
        assert torch.equal(value, weights[name])
        assert value.grad is None


def test_the_result_does_not_depend_on_dropout_or_the_seed(net, images):
    reestimate_batch_norm(net.train(), images)
    first = net[4].running_var.clone()
    torch.manual_seed(5)
    reestimate_batch_norm(net.train(), images)
    assert torch.equal(net[4].running_var, first)


def test_a_model_without_batch_norm_is_left_alone():
    assert reestimate_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), torch.zeros(1, 3, 2, 2)) == ([], 0)


def test_no_images_are_refused(net):
    with pytest.raises(ValueError, match="yielded no batch"):
        reestimate_batch_norm(net, [])
    with pytest.raises(ValueError, match=r"batch_norm_images has shape \(3, 9, 9\)"):
        reestimate_batch_norm(net, torch.zeros(3, 9, 9))
