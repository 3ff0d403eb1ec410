"""Saved generated models as a stranger gets them: their own libraries load them, in a process that is told nothing.

That process runs this file as a script, so nothing of this library is imported here.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


@torch.no_grad()
def check_loading(models: Mapping[Path, nn.Module], inputs: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Loads every folder in one fresh process, with timm or transformers alone, and compares outputs.

    Args:
        models: folder that `GeneratedModel.save_pretrained` wrote -> the model, on the CPU, in eval mode.
        inputs: images `[N, C, H, W]` or token ids `[N, block]`.

    Returns:
        name of the folder -> `loader`, the call that loaded it, and `max_difference`, the greatest absolute
        difference of a logit to one of the model that was given.

    Raises:
        RuntimeError: a folder cannot be loaded; with what the process wrote.
    """
    tensors = {"inputs": inputs.contiguous()}
    for folder, model in models.items():
        output = model(inputs)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        tensors[str(folder.resolve())] = logits.float().contiguous()
    with tempfile.TemporaryDirectory() as scratch:
        stored, request = Path(scratch) / "tensors.safetensors", Path(scratch) / "request.json"
        save_file(tensors, stored)
        names = [name for name in tensors if name != "inputs"]
        request.write_text(json.dumps({"models": names, "inputs": str(stored)}), encoding="utf-8")
        # -P: the script's own folder, which is a part of this library, stays off the path. Offline: nothing but the
        # folder may be needed. The same number of threads: sums are rounded alike.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, "-P", __file__, str(request)]
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"A saved model cannot be loaded by its own library: {done.stderr.strip()[-2000:]}")
    return {Path(name).name: facts for name, facts in json.loads(done.stdout).items()}


def _load(folder: Path) -> tuple[nn.Module, str]:
    """The model in a folder, and the call that loaded it: timm's or transformers' own."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "architecture" in config:
        import timm

        return timm.create_model(f"local-dir:{folder}", pretrained=True), "timm.create_model"
    import transformers

    name = config["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder), f"{name}.from_pretrained"


def main() -> None:
    """Reads the request that `check_loading` wrote, and prints its result."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    tensors = load_file(request["inputs"])
    loaded = {}
    for name in request["models"]:
        model, loader = _load(Path(name))
        with torch.no_grad():
            output = model.eval()(tensors["inputs"])
        logits = output if isinstance(output, torch.Tensor) else output.logits
        difference = (logits.float() - tensors[name].float()).abs().max()
        loaded[name] = {"loader": loader, "max_difference": float(difference)}
    if ours := {"modeling_wsl", "datasets_scripts", "trainers"} & sys.modules.keys():
        raise RuntimeError(f"{sorted(ours)} were imported: the check would not show what a stranger sees.")
    json.dump(loaded, sys.stdout)


if __name__ == "__main__":
    main()
