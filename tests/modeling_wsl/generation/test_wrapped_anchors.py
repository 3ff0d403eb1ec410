"""Anchors under wrappers, with constants or counters of their own: the same as the plain network."""

import math

import pytest
import timm
import torch
from generation_fixtures import EXTRACTOR, Net, generated, same, trained
from torch import nn

from modeling_wsl import open_checkpoint
from modeling_wsl.generation.plan import plan_generation
from modeling_wsl.generation.settings import GenerationSettings


WRAPPERS = {
    "DDP": lambda state: {f"module.{name}": value for name, value in state.items()},
    "compiled": lambda state: {"state_dict": {f"_orig_mod.{n}": v for n, v in state.items()}, "epoch": 1},
    "Lightning": lambda state: {"state_dict": {f"model.{n}": v for n, v in state.items()}, "hyper_parameters": {}},
    "averaged": lambda state: {"n_averaged": torch.tensor(3)} | {f"module.{n}": v for n, v in state.items()},
    "another module": lambda state: {f"tower.{n}": v for n, v in state.items()},
    "with a mask": lambda state: state | {"attn_mask": torch.full((4, 4), -math.inf).triu(1)},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_anchor_serves_as_the_plain_one_and_the_target_keeps_its_names(wrapper):
    anchor = trained(Net())
    (plain,) = generated(Net(), anchor, seed=1)
    (model,) = generated(Net(), WRAPPERS[wrapper](dict(anchor.state_dict())), seed=1)
    assert list(model.state_dict) == list(Net().state_dict())
    assert same(model.state_dict, plain.state_dict)
    assert model.provenance["tensors"].keys() == plain.provenance["tensors"].keys()


def test_one_network_under_five_wrappers_is_one_anchor():
    anchor, other = trained(Net()), trained(Net(), seed=1)
    state = dict(anchor.state_dict())
    anchors = [anchor, *(wrap(state) for wrap in WRAPPERS.values()), other]
    (model,) = generated(Net(), anchors, seed=1)
    assert len(model.provenance["anchors"]) == 2
    assert same(model.state_dict, generated(Net(), [anchor, other], seed=1)[0].state_dict)
    plan = plan_generation(EXTRACTOR, Net(), anchors, GenerationSettings())
    assert plan.given == (0, len(anchors) - 1)
    with pytest.raises(ValueError, match="give two, not 1"):
        generated(Net(), [anchor, WRAPPERS["DDP"](state)], method="interpolation")


def test_a_swin_file_of_older_timm_with_its_masks_serves_as_anchor():
    options = {"num_classes": 3, "img_size": 32, "window_size": 2, "depths": (2, 2), "num_heads": (1, 1)}
    target = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=8, **options)
    mask = torch.zeros(4, 4, 4).index_fill(2, torch.tensor([3]), -100.0)
    anchor = dict(target.state_dict()) | {"layers.0.blocks.1.attn_mask": mask}
    with open_checkpoint(anchor) as checkpoint:
        assert checkpoint.constants
    (model,) = generated(target, anchor, seed=1)
    assert list(model.state_dict) == list(target.state_dict())


class Masked(nn.Module):
    """A module that stores its mask, as GPT-2 once did."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("attn_mask", torch.full((4, 4), -math.inf).triu(1))

    def forward(self, x):
        return self.fc(x)


def test_a_target_keeps_the_constants_that_it_stores_also_where_the_anchor_has_none():
    target, anchor = Masked(), {f"module.{n}": v for n, v in trained(nn.Linear(8, 8)).state_dict().items()}
    anchor = {n.replace("module", "module.fc"): v for n, v in anchor.items()}
    for source in (anchor, {**anchor, "module.attn_mask": target.attn_mask}):
        (model,) = generated(target, source, seed=1)
        assert torch.equal(model.state_dict["attn_mask"], target.attn_mask)
        assert model.instantiate()(torch.ones(1, 8)).isfinite().all()
