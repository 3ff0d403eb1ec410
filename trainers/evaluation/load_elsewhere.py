"""Loads saved models with their own libraries and nothing else; run as a script, in a process that knows no hf-wsl.

`python load_elsewhere.py request.json` reads {"models": [folder, ...], "inputs": a safetensors file with the tensor
"inputs"} and prints {folder: {"loader": ..., "max_difference": ...}}: the greatest absolute difference between what
the loaded model returns and the tensor of the folder's name in the same file.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def load(folder: Path) -> tuple[torch.nn.Module, str]:
    """The model in a folder, and the call that loaded it: timm's or transformers' own."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "architecture" in config:
        import timm

        return timm.create_model(f"local-dir:{folder}", pretrained=True), "timm.create_model"
    import transformers

    name = config["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder), f"{name}.from_pretrained"


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    tensors = load_file(request["inputs"])
    found = {}
    for name in request["models"]:
        model, loader = load(Path(name))
        with torch.no_grad():
            output = model.eval()(tensors["inputs"])
        logits = output if isinstance(output, torch.Tensor) else output.logits
        difference = (logits.float() - tensors[name].float()).abs().max()
        found[name] = {"loader": loader, "max_difference": float(difference)}
    if loaded := {"modeling_wsl", "datasets_scripts", "trainers"} & sys.modules.keys():
        raise RuntimeError(f"{sorted(loaded)} were imported: the check would not show what a stranger sees.")
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
