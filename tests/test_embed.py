"""`embed`: which models and revisions its rows are of."""

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from datasets_scripts.embed import embed
from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLModel


@pytest.fixture
def backbone(tmp_path):
    config = WSLConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, latent_size=16, window_size=32)
    WSLModel(config).save_pretrained(tmp_path / "backbone")
    WSLFeatureExtractor().save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def test_a_pinned_model_of_the_hub_is_read_at_its_revision(backbone, hub, tmp_path):
    commit = hub.add("ada/net", {"model.safetensors": save({"weight": torch.ones(4, 5)})})
    hub.repositories["ada/net"].revisions["v1"] = commit
    count, refused = embed(backbone, ["ada/net@v1"], tmp_path / "table.parquet")
    assert (count, refused) == (1, {})
    assert any("/revision/v1" in request for request in hub.requests)
    with pytest.raises(ValueError, match="has no revision 'v2'"):
        embed(backbone, ["ada/net@v2"], tmp_path / "other.parquet")


def test_a_model_without_tokens_is_left_out_with_the_reason(backbone, tmp_path):
    for name, tensors in (("full", {"weight": torch.ones(4)}), ("empty", {"n.running_mean": torch.ones(3)})):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        (tmp_path / "zoo" / name / "model.safetensors").write_bytes(save({**tensors, "n.running_var": torch.ones(3)}))
    count, refused = embed(backbone, [tmp_path / "zoo"], tmp_path / "table.parquet")
    assert count == 1 and list(refused) == ["empty"]
    assert pq.read_table(tmp_path / "table.parquet")["model_id"].to_pylist() == ["full"]
