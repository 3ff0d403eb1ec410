"""The manifest against a reference that spells out every token, entry by entry."""

import pytest
import torch

from modeling_wsl.tokens.manifest import Segment, TensorSpec, WeightManifest, positions_from_segments


def layered(spec_text: str) -> dict[str, TensorSpec]:
    """'a.weight:7x3 a.bias:7' -> specs in that order; a dtype may follow as `:int64`."""
    specs = {}
    for word in spec_text.split():
        name, shape, *dtype = word.split(":")
        specs[name] = TensorSpec(name, tuple(int(n) for n in shape.split("x") if n), dtype[0] if dtype else "float32")
    return specs


MIXED = layered(
    "cls:1x1x50 conv.weight:7x3x3x3 conv.bias:7 bn.weight:7 bn.bias:7 bn.running_mean:7 bn.running_var:7 "
    "bn.num_batches_tracked::int64 scale: lin.weight:9x100 lin.bias:9 gpt.weight:4x12 gpt.bias:12"
)
LAYOUTS = [
    {"tokenization": "dense"},
    {"tokenization": "sparse"},
    {"tokenization": "sparse", "position_unit": "row"},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=["dense", "sparse", "sparse rows"])
def test_positions_and_masks_equal_a_token_by_token_reference(options):
    manifest = WeightManifest.from_tensors(MIXED, token_size=8, **options)
    positions, valid = [], []
    for index, layer in enumerate(manifest.layers):
        token_in_layer = 0
        for block in (block for block in manifest.blocks if block.layer == index):
            for row in range(block.rows):
                left = block.row_entries
                while left > 0:
                    k = block.first_row + row if manifest.position_unit == "row" else token_in_layer
                    positions.append([len(positions), index, k])
                    valid.append(min(left, 8))
                    left -= 8
                    token_in_layer += 1
        assert token_in_layer == layer.num_tokens
    assert manifest.positions().tolist() == positions
    assert manifest.valid_entries().tolist() == valid
    assert manifest.token_mask().sum(1).tolist() == valid


@pytest.mark.parametrize("options", LAYOUTS, ids=["dense", "sparse", "sparse rows"])
@pytest.mark.parametrize("window", [1, 3, 5, 17])
def test_any_window_has_the_positions_and_the_mask_of_the_whole(options, window):
    manifest = WeightManifest.from_tensors(MIXED, token_size=8, **options)
    positions, mask = manifest.positions(), manifest.token_mask()
    for start in range(0, manifest.num_tokens, window):
        stop = min(start + window, manifest.num_tokens)
        assert torch.equal(manifest.positions(start, stop), positions[start:stop])
        assert torch.equal(manifest.token_mask(start, stop), mask[start:stop])


def test_a_layer_is_the_tensors_of_one_module_in_state_dict_order():
    manifest = WeightManifest.from_tensors(MIXED)
    layers = {layer.name: [spec.name for spec in layer.tensors] for layer in manifest.layers}
    assert layers == {
        "": ["cls", "scale"],
        "conv": ["conv.weight", "conv.bias"],
        "bn": ["bn.weight", "bn.bias"],
        "lin": ["lin.weight", "lin.bias"],
        "gpt": ["gpt.weight", "gpt.bias"],
    }


def test_a_batch_norm_is_recognized_by_its_running_mean_and_never_by_its_name():
    specs = layered(
        "bn.weight:4 bn.bias:4 norm1.weight:4 norm1.running_mean:4 norm1.running_var:4 norm1.num_batches_tracked:1 "
        "tf/gamma:4 tf/moving_mean:4 tf/moving_variance:4 running_var_head.weight:4"
    )
    carried = [spec.name for spec in WeightManifest.from_tensors(specs).carried]
    assert carried == [
        "norm1.running_mean",
        "norm1.running_var",
        "norm1.num_batches_tracked",  # stored as float32 here: the counter of a batch norm all the same
        "tf/moving_mean",
        "tf/moving_variance",
    ]
    kept = WeightManifest.from_tensors(specs, batch_norm_statistics="tokenize")
    assert not kept.carried
    assert kept.num_parameters == sum(spec.numel for spec in specs.values())


def test_a_bias_joins_its_weight_only_where_its_length_is_the_number_of_output_rows():
    manifest = WeightManifest.from_tensors(MIXED, tokenization="sparse", token_size=8)
    groups = [[spec.name for spec in block.tensors] for block in manifest.blocks]
    assert ["conv.weight", "conv.bias"] in groups
    assert ["gpt.weight"] in groups  # GPT-2's Conv1D is [in, out]
    assert ["gpt.bias"] in groups
    rnn = layered("rnn.weight_ih_l0:12x5 rnn.weight_hh_l0:12x3 rnn.bias_ih_l0:12 rnn.bias_hh_l0:12")
    groups = WeightManifest.from_tensors(rnn, tokenization="sparse").blocks
    assert [[s.name for s in b.tensors] for b in groups] == [
        ["rnn.weight_ih_l0", "rnn.bias_ih_l0"],
        ["rnn.weight_hh_l0", "rnn.bias_hh_l0"],
    ]


def test_json_gives_back_an_equal_manifest():
    manifest = WeightManifest.from_tensors(MIXED, {"head.weight": "lin.weight"}, tokenization="sparse")
    assert WeightManifest.from_json(manifest.to_json()) == manifest
    with pytest.raises(ValueError, match="not a weight manifest"):
        WeightManifest.from_json('{"layers": [["a"]]}')


def test_rows_of_tokens_share_a_position_when_positions_count_rows():
    segments = [Segment(layer=2, position=5, stride=3, length=1), Segment(layer=2, position=6, stride=3, length=7)]
    positions = positions_from_segments(100, segments)
    assert positions[:, 0].tolist() == list(range(100, 108))
    assert positions[:, 2].tolist() == [5, 6, 6, 6, 7, 7, 7, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenization": "densely"}, "tokenization='densely'.*'dense', 'sparse'"),
        ({"position_unit": "row"}, "needs tokenization='sparse'"),
        ({"token_size": 0}, "token_size is 0"),
        ({"batch_norm_statistics": "drop"}, "batch_norm_statistics='drop'"),
    ],
)
def test_an_impossible_layout_is_refused_with_the_option_named(options, message):
    with pytest.raises(ValueError, match=message):
        WeightManifest.from_tensors(MIXED, **options)


def test_tokens_outside_of_the_model_are_refused():
    manifest = WeightManifest.from_tensors(MIXED)
    with pytest.raises(IndexError, match=f"outside of the {manifest.num_tokens} tokens"):
        manifest.positions(0, manifest.num_tokens + 1)
