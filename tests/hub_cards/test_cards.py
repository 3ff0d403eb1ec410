"""Cards of models: made of facts, readable by the Hub's own parser, and honest about what was not measured."""

import re

import pytest
from huggingface_hub import ModelCard, metadata_load

from hub_cards.backbone import BackboneFacts, backbone_card
from hub_cards.cards import check_card, user_edited, without_local_paths
from hub_cards.errors import PublishError
from hub_cards.generated_model import GeneratedFacts, generated_model_card
from hub_cards.origins import Origin, refuse_withheld, settle_license
from modeling_wsl import WSLConfig
from modeling_wsl.hub_card import is_ours, signed


TRAINING = {
    "status": "completed",
    "size": "nano",
    "parameters": 1_234_567,
    "seed": 7,
    "steps": 400,
    "total_steps": 400,
    "windows_per_step": 16,
    "tokens_seen": 98_765,
    "seconds": 312.5,
    "dataset_commit": "c0ffee" * 6 + "c0ff",
    "train_windows": 120,
    "train_tokens": 54_321,
    "validation_tokens": 2_468,
    "val_r2": 0.5512,
    "val_r2_step": 400,
    "best_val_r2": 0.5634,
    "best_val_r2_step": 300,
    "val_r2_history": [{"step": 0, "val_r2": 0.5}, {"step": 300, "val_r2": 0.5634}, {"step": 400, "val_r2": 0.5512}],
    "baselines": {"random projection": 0.5566, "PCA": 0.5771},
    "processes": 2,
    "device": "cuda",
    "versions": {"torch": "2.14.1", "transformers": "5.24.0"},
    "config": {
        "dataset": "org/tokens",
        "dataset_revision": None,
        "model_name_or_path": None,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "onecycle",
        "weight_decay": 3e-9,
        "precision": "bfloat16",
        "save_dtype": "bfloat16",
    },
}
PROVENANCE = {
    "draw": 1,
    "draw_seed": 991,
    "target": {"name": "resnet18", "library": "timm", "arguments": {"model_name": "resnet18"}},
    "anchors": [],
    "backbone": {"name": "org/backbone", "revision": "b" * 40, "sha256": None, "dtype": "float32", "device": "cpu"},
    "feature_extractor": {"tokenization": "dense", "token_size": 230},
    "seed": 5,
    "num_candidates": 4,
    "total_draws": 4,
    "noise": "shared",
    "bandwidth": 0.2,
    "window_size": 512,
    "halo": 64,
    "batch_size": 8,
    "autocast_dtype": None,
    "versions": {"torch": "2.14.1", "hf-wsl": None},
    "tensors": {"conv1.weight": "sampled", "bn1.running_mean": "inherited: timm/resnet18", "fc.weight": "initialized"},
    "entries": {"sampled": 900, "inherited: timm/resnet18": 64, "initialized": 36},
}
ANCHOR = Origin("timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k", "a" * 40, "5" * 64, "apache-2.0")
LOCAL = Origin("my-resnet", None, None, "6" * 64, None)


def backbone(repo_id="org/nano", license="mit", licenses=None, dataset_id="org/tokens", layers=None, **training):
    stated = {"MIT": 90, "cc-by-nc-4.0": 6} if licenses is None else licenses
    config = WSLConfig.from_size("nano")
    extractor = {"token_size": 230, "batch_norm_statistics": "carry", "layer_normalization": layers}
    facts = {**TRAINING, **training}
    return backbone_card(BackboneFacts(repo_id, facts, config, extractor, license, stated, dataset_id, None))


def generated(anchors=(ANCHOR,), license="apache-2.0", config=None, **provenance):
    config = {"architecture": "resnet18", "num_classes": 1000} if config is None else config
    own = Origin("org/backbone", "org/backbone", "b" * 40, None, "mit")
    facts = {**PROVENANCE, **provenance}
    return generated_model_card(GeneratedFacts("org/made", facts, config, anchors, own, license))


def test_a_model_from_a_donor_names_it_and_says_how_its_weights_were_taken():
    donor = {
        **{name: PROVENANCE[name] for name in ("target", "anchors", "seed", "versions")},
        "donor": 0,
        "method": "fit",
        "num_images": 512,
        "head": {"images": 512},
        "tensors": {"a": "fitted: big", "b": "resized: big"},
        "entries": {"fitted: big": 3, "resized: big": 1},
    }
    config = {"architecture": "resnet18", "num_classes": 10}
    card = generated_model_card(GeneratedFacts("org/made", donor, config, (ANCHOR,), None, "apache-2.0"))
    assert "made of a trained model of another size" in card and "| backbone |" not in card
    assert "| fitted from `big` | fitted in closed form" in card and "| 75.00% |" in card
    assert "| unlabeled examples | 512 |" in card


def without_front_matter(card):
    return card.split("---\n", 2)[2]


@pytest.mark.parametrize("card", [backbone(), generated()], ids=["backbone", "generated model"])
def test_a_card_is_read_by_the_hub_s_parser_and_no_placeholder_is_left_in_it(card, tmp_path):
    (tmp_path / "README.md").write_text(card)
    front = metadata_load(tmp_path / "README.md")
    assert front == ModelCard(card).data.to_dict()
    assert check_card(card, "README.md") == front
    assert not re.search(r"More Information Needed|\{\{|\{%|\bNone\b|<!-- Provide", card)
    assert card.count("\n# ") == 1


def test_a_backbone_s_front_matter_says_what_it_is_and_gives_the_results_with_the_honest_lines():
    data = ModelCard(backbone()).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("transformers", "mit", "feature-extraction")
    assert data.datasets == ["org/tokens"]
    assert {"hf-wsl", "weight-space-learning"} <= set(data.tags)
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    assert found == {
        "random projection of the same size (baseline)": 0.5566,
        "PCA of the same size (baseline)": 0.5771,
        "backbone before training (step 0)": 0.5,
        "backbone, best of the run (step 300; not these weights)": 0.5634,
        "backbone, these weights (step 400)": 0.5512,
    }
    assert {result.metric_type for result in data.eval_results} == {"r_squared"}
    assert {result.dataset_type for result in data.eval_results} == {"org/tokens"}
    assert {result.dataset_revision for result in data.eval_results} == {TRAINING["dataset_commit"]}


def test_a_backbone_s_text_tells_how_to_load_it_how_it_was_trained_and_what_it_is_not():
    text = without_front_matter(backbone())
    for expected in (
        'AutoModel.from_pretrained("org/nano")',
        'pipeline("weight-embedding", model="org/nano", revision="<commit>", trust_remote_code=True)',
        "1,234,567 parameters (size `nano`",
        "2,468 tokens of the validation split",
        "54,321 in 120 windows",
        "400 of 400 (completed)",
        "5 minutes on 2 x cuda",
        "| MIT | 90 |",
        "| cc-by-nc-4.0 | 6 |",
        "published under `mit`",
        "batch-norm statistics left out",
    ):
        assert expected in text, expected


@pytest.mark.parametrize(
    ("val_r2", "baselines", "verdict"),
    [
        (0.5512, {"PCA": 0.5771}, "it is 0.026 below PCA of the same size: **it does not beat PCA.**"),
        (0.6012, {"PCA": 0.5771}, "it is 0.024 above PCA of the same size."),
        (0.5772, {"PCA": 0.5771}, "it does as well as PCA of the same size, and no better."),
        (0.6, {}, "PCA was not fitted in this run"),
        (None, {"PCA": 0.5}, "no validation split: nothing is known"),
    ],
)
def test_the_verdict_on_a_backbone_follows_from_its_figures(val_r2, baselines, verdict):
    assert verdict in backbone(val_r2=val_r2, baselines=baselines)


def test_what_was_not_measured_is_called_so_and_is_no_result():
    none = {"val_r2": None, "val_r2_step": None, "best_val_r2": None, "best_val_r2_step": None, "val_r2_history": []}
    card = backbone(**none, baselines={}, licenses={}, dataset_id=None)
    assert ModelCard(card).data.eval_results is None
    assert "| PCA of the same size (baseline) | not measured |" in card
    assert "| backbone, these weights | not measured |" in card
    assert "was not to be found when this card was written" in card
    assert "org/tokens` (not on the Hub)" in card


def test_a_normalization_by_layer_is_told():
    told = "normalized by the zoo's statistics of each of its 2 layers"
    assert told in " ".join(backbone(layers={"conv1": [0.0, 1.0], "fc": [0.1, 2.0]}).split())
    assert "normalized by" not in backbone()


def test_an_unfinished_schedule_is_a_limit():
    assert "ended after 90 of 400 planned steps" in backbone(steps=90, status="out of time")


def test_a_license_that_the_hub_does_not_list_is_other_with_its_name():
    data = ModelCard(backbone(license="Our Lab License")).data
    assert (data.license, data.license_name) == ("other", "Our Lab License")


def test_a_generated_model_s_license_is_that_of_its_parts_or_the_publisher_s_word():
    shared = (Origin("lab/net", "lab/net", "c" * 40, None, "MIT License"),)
    assert "Published under `mit`, the license of all its parts." in generated(shared, license="mit")
    assert "Published under `gpl-3.0`, by the word of the publisher" in generated(shared, license="gpl-3.0")


def test_text_of_other_people_begins_no_link_picture_code_or_tag_in_a_card():
    hostile = "mit ![x](http://a.b/c.png) <img src=x> `code` a|b\n# Heading"
    anchors = (Origin("my `net`", None, None, "6" * 64, hostile),)
    config = {"model_type": "`x`", "architectures": ["os\nimport os"]}
    target = {"name": "`n`\n# b", "library": "transformers", "arguments": {}}
    for card in (generated(anchors, config=config, target=target), backbone(licenses={hostile: 3})):
        text = without_front_matter(card)
        assert r"!\[x\](http" in text and "&lt;img" in text and r"\`code\`" in text and r"a\|b # Heading" in text
        assert text.count("\n# ") == 1 and "import os" not in text


def test_a_generated_model_names_its_anchors_as_base_models_and_where_its_numbers_are_from():
    card = generated((ANCHOR, LOCAL))
    data = ModelCard(card).data
    assert (data.library_name, data.license) == ("timm", "apache-2.0")
    assert data.pipeline_tag == "image-classification"
    assert data.base_model == ["timm/resnet18.a1_in1k"]
    text = without_front_matter(card)
    for expected in (
        "Nobody trained these weights: a backbone generated them from 2 trained models",
        'timm.create_model("hf-hub:org/made", pretrained=True)',
        "| sampled | drawn by the backbone | 1 | 900 | 90.00% |",
        "| inherited from `timm/resnet18` | the first trained model's own | 1 | 64 | 6.40% |",
        "| initialized | the library's initialization, untrained | 1 | 36 | 3.60% |",
        "draw 1 of 4",
        "seed | 5; of this draw: 991",
        "bandwidth 0.2, noise shared",
        "`my-resnet` (not on the Hub) | sha256 `666666666666` | not stated",
        "commit `aaaaaaaaaaaa` | apache-2.0",
        "| backbone | [org/backbone]",
        "Nothing was measured when the model was generated",
    ):
        assert expected in text, expected


def test_a_generated_model_s_card_tells_how_it_was_drawn_and_what_was_adapted():
    between = generated((ANCHOR, LOCAL), method="interpolation", weight_of_second_anchor=0.25)
    assert "| interpolation | 0.25 of the way from first to second |" in between
    adapted = {"conv1.weight": {"anchor_shape": [8, 3, 3, 3], "shape": [8, 1, 3, 3], "how": "adapted", "anchors": [0]}}
    card = generated(adapted=adapted, bootstrap_rounds=2, round=1)
    assert "| `conv1.weight` | adapted: [8, 3, 3, 3] there, [8, 1, 3, 3] here |" in card
    assert "| bootstrapping | round 1 of 2 |" in card


def test_a_generated_model_s_score_is_told_with_what_chose_it():
    card = generated(score=0.8125, ranked_by="validation accuracy")
    assert "Of 4 candidates this one was kept for its score 0.8125 (validation accuracy)" in card
    assert "its score not finite" in generated(score=None, ranked_by="validation accuracy")


def test_each_library_s_models_are_loaded_in_its_own_way():
    target = {"name": "net", "library": "transformers", "arguments": {}}
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    card = generated(target=target, config=config)
    assert 'ViTForImageClassification.from_pretrained("org/made")' in card
    plain = generated(target={"name": "net", "library": "plain", "arguments": {}}, config={})
    assert 'hf_hub_download("org/made", "model.safetensors")' in plain
    assert ModelCard(plain).data.library_name is None


def test_a_card_is_ours_until_anyone_changes_it():
    card = signed("---\nlicense: mit\n---\n\n# A\n")
    assert is_ours(card)
    for changed in (
        card.replace("# A", "# B"),
        card + "more\n",
        card.replace("license: mit", "license: gpl"),
        "# A\n",
    ):
        assert not is_ours(changed)
        assert user_edited(changed)
    assert not user_edited("---\nlicense: mit\n---\n**Developed by:** [More Information Needed]\n")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("# No front matter\n", "has no front matter"),
        ("---\nlicense: [mit\n---\n# A\n", "cannot be read"),
        ("---\n- a\n---\n# A\n", "cannot be read"),
        (
            "---\nlicense: mit\n---\n# A\n\n[More Information Needed]\n",
            "line 6: .More Information Needed. is",
        ),
    ],
)
def test_a_card_that_the_hub_would_not_take_or_nobody_filled_in_is_refused(card, message):
    with pytest.raises(PublishError, match=message):
        check_card(card, "README.md")


def test_the_license_follows_from_parts_that_share_one_or_is_asked_for():
    def settle(given, *parts):
        return settle_license(given, parts, "its anchors")

    assert settle(None, "mit", "MIT License") == "mit"
    assert settle("gpl-3.0", "mit", None) == "gpl-3.0"
    assert settle("Apache License 2.0", "mit") == "apache-2.0"
    assert settle("Our Lab License") == "Our Lab License"
    for given, parts, message in (
        (None, ["mit", None], "those of its anchors: mit, not stated. .*--license ID"),
        (None, ["mit", "cc-by-sa-4.0"], "cc-by-sa-4.0, mit. .*--license ID"),
        (None, ["my-own"], "my-own. .*--license ID"),
        (None, ["llama3"], "llama3. .*--license ID"),
        (None, [], "not known. .*--license ID"),
        ("unknown", ["mit"], "says nothing"),
        ("cc", ["mit"], "says nothing"),
    ):
        with pytest.raises(PublishError, match=message):
            settle(given, *parts)


def test_what_was_made_from_weights_that_may_not_be_passed_on_is_not_published():
    refuse_withheld([ANCHOR, LOCAL])  # the publisher's word counts for a model of one's own that states nothing
    for license in ("cc-by-nc-nd-4.0", "llama3", "my-own", None):
        with pytest.raises(PublishError, match="lab/net: .*license.* published; generate from other anchors"):
            refuse_withheld([ANCHOR, Origin("lab/net", "lab/net", "c" * 40, None, license)])
    with pytest.raises(PublishError, match="my-net: license gemma does not let others share"):
        refuse_withheld([Origin("my-net", None, None, None, "gemma")])


def test_local_folders_are_taken_out_of_what_is_published_and_nothing_else_is():
    content = {
        "config": {"dataset": "/home/me/secret/tokens", "output_dir": "runs/one", "size": "nano"},
        "anchors": [{"source": "C:\\Users\\me\\net"}, {"source": "timm/resnet18"}, {"source": "~/nets/mine"}],
        "tensors": {"w": "inherited: /home/me/nets/mine", "b": "sampled"},
        "entries": {"inherited: /home/me/nets/mine": 5},
        "ratio": "3/4",
    }
    assert without_local_paths(content) == {
        "config": {"dataset": "tokens", "output_dir": "runs/one", "size": "nano"},
        "anchors": [{"source": "net"}, {"source": "timm/resnet18"}, {"source": "mine"}],
        "tensors": {"w": "inherited: mine", "b": "sampled"},
        "entries": {"inherited: mine": 5},
        "ratio": "3/4",
    }
