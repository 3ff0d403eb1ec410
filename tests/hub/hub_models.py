"""Sixty mixed models for the tests' Hub: good ones, copies, and ones that must be refused, each for its own reason.

`seed_mixed(hub)` publishes them and says what must become of each; from a script as from a test. They are made once
a process (a few seconds, most of it the imports of timm and transformers).
"""

import atexit
import functools
import re
import shutil
import tempfile
from pathlib import Path

from hub_broken_models import broken_models
from hub_good_models import good_models
from hub_mixed_model import GENERATION, IMAGES, MASKED, MixedModel
from hub_server import HubServer


TASKS = (IMAGES, MASKED, GENERATION)  # the task tags under which all of them are listed
SMALLEST = 1000  # parameters: all but the one that is too small have more
LARGEST = 1_000_000  # parameters: all but the one that is too large have fewer


@functools.cache
def mixed_models(seed: int = 0) -> tuple[MixedModel, ...]:
    """The models, originals before their copies; the same bytes for the same seed."""
    folder = Path(tempfile.mkdtemp(prefix="tests-hub-mixed-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return (*good_models(1000 * seed), *broken_models(1000 * seed + 500, folder))


def seed_mixed(hub: HubServer, seed: int = 0) -> dict[str, str]:
    """Publishes the models, the most downloaded first; returns the outcome that each must get, by id."""
    models = mixed_models(seed)
    for number, model in enumerate(models):
        downloads = 10 * (len(models) - number)
        hub.add(model.repo_id, model.files, downloads=downloads, likes=number % 7, **model.options)
        if model.always_fails:
            hub.fault(rf"/{re.escape(model.repo_id)}(/|\?|$)", times=-1, status=500)
    return {model.repo_id: model.outcome for model in models}
