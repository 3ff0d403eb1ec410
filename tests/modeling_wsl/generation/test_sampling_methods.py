"""Interpolation between two anchors, bootstrapped sampling, and the paper's protocols."""

import weakref

import pytest
import torch
from generation_fixtures import EXTRACTOR, Net, generated, same, small_backbone, trained

from modeling_wsl.generation.generate import generate
from modeling_wsl.generation.generated_model import GeneratedModel
from modeling_wsl.generation.plan import plan_generation
from modeling_wsl.generation.settings import GenerationSettings


def test_interpolation_gives_the_points_of_the_line_between_two_anchors_latents():
    anchors = [trained(Net(), seed) for seed in range(2)]
    inner = generated(Net(), anchors, method="interpolation", num_samples=3)
    weights = [model.provenance["weight_of_second_anchor"] for model in inner]
    assert weights == [0.25, 0.5, 0.75]
    assert inner[0].provenance["method"] == "interpolation"
    assert "bandwidth" not in inner[0].provenance
    whole = generated(Net(), anchors, method="interpolation", num_samples=5, interpolation_ends=True)
    assert [model.provenance["weight_of_second_anchor"] for model in whole] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for one, two in zip(inner, whole[1:], strict=False):
        assert same(one.state_dict, two.state_dict)
    ends = [generated(Net(), [anchor], bandwidth=0)[0].state_dict for anchor in anchors]
    torch.testing.assert_close(whole[0].state_dict["fc.weight"], ends[0]["fc.weight"])
    torch.testing.assert_close(whole[-1].state_dict["fc.weight"], ends[1]["fc.weight"])


def test_interpolation_needs_two_anchors_and_a_line_with_ends_two_points():
    for number in (1, 3):
        with pytest.raises(ValueError, match=f"give two, not {number}"):
            generated(Net(), [Net()] * number, method="interpolation")
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        generated(Net(), [Net()] * 2, method="interpolation", interpolation_ends=True)


def test_bootstrapped_rounds_draw_around_the_best_of_the_round_before_and_the_best_of_all_are_kept():
    anchors = [trained(Net(), seed) for seed in range(2)]
    seen = []

    def score(module):
        return float(module.conv.weight.detach().sum())

    def noted(module):
        seen.append(score(module))
        return seen[-1]

    options = {"num_samples": 2, "num_candidates": 6, "bandwidth": 0.5, "seed": 1}
    kept = generated(Net(), anchors, bootstrap_rounds=3, rank=noted, **options)
    assert len(seen) == 24
    assert [model.provenance["score"] for model in kept] == sorted(seen, reverse=True)[:2]
    assert [seen[model.provenance["draw"]] for model in kept] == [model.provenance["score"] for model in kept]
    rounds = [seen[start : start + 6] for start in range(0, 24, 6)]
    assert max(rounds[-1]) > max(rounds[0])  # steps of the noise add up, from the better ones on
    assert all(model.provenance["round"] == model.provenance["draw"] // 6 for model in kept)
    # the first round is what it would be alone
    alone = generated(Net(), anchors, rank=score, **options)
    assert alone[0].provenance["score"] == max(rounds[0])
    again = generated(Net(), anchors, bootstrap_rounds=3, rank=score, **options)
    assert [same(one.state_dict, two.state_dict) for one, two in zip(kept, again, strict=True)] == [True, True]


def test_beside_the_kept_models_one_candidate_is_in_memory(monkeypatch):
    alive, most = weakref.WeakSet(), []
    make = GeneratedModel.__init__

    def counted(self, *args, **kwargs):
        make(self, *args, **kwargs)
        alive.add(self)
        most.append(len(alive))

    monkeypatch.setattr(GeneratedModel, "__init__", counted)
    monkeypatch.setattr(GeneratedModel, "__hash__", object.__hash__)
    settings = GenerationSettings(
        num_samples=2, num_candidates=5, bootstrap_rounds=1, rank=lambda module: 1.0, progress=False, halo=8
    )
    generate(small_backbone(), plan_generation(EXTRACTOR, Net(), [trained(Net())], settings))
    assert len(most) == 10 and max(most) == 3


def test_bootstrapping_is_refused_without_a_score_or_a_density():
    with pytest.raises(ValueError, match="bootstrap_rounds=2 needs rank"):
        GenerationSettings(bootstrap_rounds=2)
    with pytest.raises(ValueError, match="bootstrap_rounds=1 needs method='density', not 'interpolation'"):
        generated(Net(), [Net()] * 2, method="interpolation", bootstrap_rounds=1, rank=lambda module: 1.0)
    with pytest.raises(ValueError, match="bootstrap_rounds is -1"):
        GenerationSettings(bootstrap_rounds=-1)


def test_the_papers_protocols_are_named_and_their_options_can_be_outranked():
    def rank(module):
        return 1.0

    few_shot, init = GenerationSettings.few_shot(rank=rank), GenerationSettings.init(rank=rank, seed=3)
    assert (few_shot.num_candidates, few_shot.num_samples, few_shot.bandwidth) == (50, 10, 0.2)
    assert (init.num_candidates, init.num_samples, init.seed) == (5, 1, 3)
    assert GenerationSettings.few_shot(rank=rank, num_candidates=20).num_candidates == 20
    with pytest.raises(ValueError, match="num_candidates=50 needs rank"):
        GenerationSettings.few_shot()


def test_a_network_with_a_random_part_is_not_ranked_by_its_accuracy():
    anchor = trained(Net())
    loader = [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))]
    for part in ("fc", "conv"):
        with pytest.raises(ValueError, match=f"rank: {part}.bias.* initialized at random"):
            generated(Net(), [anchor], initialize=[part], rank=loader)
    assert len(generated(Net(), [anchor], initialize=["fc"], rank=lambda module: 1.0)) == 1  # which may train it first


def test_a_candidate_without_a_finite_score_is_no_anchor_of_the_next_round():
    options = {"num_samples": 2, "num_candidates": 3, "bootstrap_rounds": 1}
    with pytest.raises(ValueError, match="No candidate of round 0 has a finite score"):
        generated(Net(), [trained(Net())], rank=lambda module: float("nan"), **options)


def test_every_model_has_a_provenance_of_its_own():
    first, second = generated(Net(), [trained(Net())], num_samples=2)
    first.provenance["anchors"].clear()
    assert second.provenance["anchors"]
