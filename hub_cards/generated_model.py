"""A generated model for the Hub: its weights and config as its library reads them, and where every tensor is from."""

from pathlib import Path

from hf_wsl.files import write_json

from .card_text import CARD_FILE
from .errors import PublishError
from .generated_model_card import GeneratedFacts, generated_model_card
from .local_paths import without_local_paths
from .origins import find_origin, settle_license
from .publication import STAGING, Publication, left_behind, read_facts, stage_card, text_files, weight_files


PROVENANCE_FILE, CONFIG_FILE, GENERATION_FILE = "provenance.json", "config.json", "generation_config.json"
OWNED = ("model*.safetensors", "model.safetensors.index.json", CONFIG_FILE, GENERATION_FILE, PROVENANCE_FILE)
NEEDED = ("target", "anchors", "backbone", "tensors", "entries", "seed", "versions")


def prepare_generated_model(folder: Path, repo_id: str, license: str | None, on_hub: str | None) -> Publication:
    """Checks the folder of a generated model and writes its card.

    Args:
        folder: of `GeneratedModel.save_pretrained`.
        repo_id: where it goes.
        license: to publish under; None: the strictest of the anchors' and the backbone's.
        on_hub: README.md of the repository, None where it has none.

    Raises:
        PublishError: a file is missing or damaged, or the licenses of its parts do not allow it.
    """
    provenance = read_facts(folder / PROVENANCE_FILE, NEEDED)
    weights = weight_files(folder)
    configs = [name for name in (CONFIG_FILE, GENERATION_FILE) if (folder / name).is_file()]
    library = provenance["target"]["library"]
    if library in ("timm", "transformers") and CONFIG_FILE not in configs:
        raise PublishError(f"{folder} lacks config.json, without which {library} cannot load it. Generate it again.")
    config = read_facts(folder / CONFIG_FILE, ()) if CONFIG_FILE in configs else {}
    anchors = [find_origin(anchor) for anchor in provenance["anchors"]]
    backbone = find_origin(provenance["backbone"])
    stated = [*(anchor.license for anchor in anchors), backbone.license]
    settled, known = settle_license(license, stated, "its anchors and backbone", adapted=True)
    facts = GeneratedFacts(repo_id, provenance, config, anchors, backbone, settled, known)
    readme, card, notes = stage_card(folder, generated_model_card(facts), on_hub)
    staged = folder / STAGING / PROVENANCE_FILE
    write_json(staged, without_local_paths(provenance))
    here = [*text_files(folder), *weights, *configs]
    files = {name: folder / name for name in here} | {PROVENANCE_FILE: staged, CARD_FILE: readme}
    return Publication(
        folder=folder,
        kind="generated model",
        repo_type="model",
        files=files,
        owned=OWNED,
        license=settled.stated,
        left=left_behind(folder, files),
        notes=(*notes, *(known.conflicts if known else ())),
        card=card,
    )
