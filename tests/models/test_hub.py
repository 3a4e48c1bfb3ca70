"""Models of a hub: asked for what the cache lacks, and nothing else. The hub is a server of this machine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.dual_encoders import make_open_clip
from tests.support.hub import COMMIT, HubServer

LOAD = """
import sys
from clipfilter_wds import ClipScorer

for line in sys.stdin:
    print(ClipScorer(line.strip(), device="cpu").model_name, flush=True)
"""


@contextmanager
def loading(hub: HubServer, cache: Path) -> Iterator[Callable[[str], list[str]]]:
    """Loads models in a process of its own, which keeps nothing of them; gives what the hub was asked for."""
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    def load(model: str) -> list[str]:
        hub.requests.clear()
        process.stdin.write(f"{model}\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{model}\n"
        return [*hub.requests]

    with process:
        yield load
        process.stdin.close()
        assert process.wait() == 0


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    return make_open_clip(tmp_path_factory.mktemp("models") / "open_clip")


@pytest.mark.parametrize("kind", ["clip", pytest.param("open_clip", marks=pytest.mark.slow)])
def test_a_model_that_is_whole_in_the_cache_is_loaded_without_asking(kind, clip_folder, request, tmp_path):
    folder = clip_folder if kind == "clip" else request.getfixturevalue("open_clip_folder")
    name = "org/tiny" if kind == "clip" else "open_clip:org/tiny"
    with HubServer("org/tiny", folder).serving() as hub, loading(hub, tmp_path) as load:
        assert load(name)
        assert load(name) == []


def test_the_hub_is_asked_for_a_file_that_the_cache_lacks(clip_folder, tmp_path):
    """Also where another file would do, such as the older preprocessor_config.json."""
    folder, cache = shutil.copytree(clip_folder, tmp_path / "model"), tmp_path / "cache"
    images = json.loads((folder / "processor_config.json").read_bytes())["image_processor"]
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    with HubServer("org/tiny", folder).serving() as hub, loading(hub, cache) as load:
        load("org/tiny")
        for file in ("model.safetensors", "tokenizer.json", "processor_config.json"):
            (cache / "models--org--tiny" / "snapshots" / COMMIT / file).unlink()
            assert f"HEAD /org/tiny/resolve/main/{file}" in load("org/tiny")
        assert load("org/tiny") == []
