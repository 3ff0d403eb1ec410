"""Makes every test hermetic: the Hub is a server on loopback, caches are temporary, nothing phones home.

huggingface_hub, datasets and transformers read these variables when they are imported, hence before any import here.
Commands that tests start inherit them.
"""

import gc
import os
import shutil
import tempfile

import pytest
from hub_server import HubServer


_HOME = tempfile.mkdtemp(prefix="hf-wsl-tests-")
_HUB = HubServer().start()
for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(name, None)
os.environ |= {
    "HF_ENDPOINT": _HUB.url,
    "HF_HOME": _HOME,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "HF_HUB_DISABLE_XET": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "OMP_NUM_THREADS": "1",  # one test process a core: threads of several would wait for each other, spinning
}


@pytest.fixture(scope="session")
def hub_server():
    """The Hub that this process and its commands talk to, as the last test left it; for fixtures of whole modules."""
    return _HUB


@pytest.fixture
def hub(hub_server):
    """The same, empty at the start of every test."""
    hub_server.reset()
    return hub_server


def pytest_collection_finish():
    """Puts what the imports made, over a million objects, out of the sight of the garbage collector.

    Accelerate collects garbage at the start of every training run, which took as long as a whole run of these.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def modules_that_load_late_are_no_garbage():
    """Libraries load much of themselves when a test first needs it."""
    yield
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    _HUB.stop()
    shutil.rmtree(_HOME, ignore_errors=True)
