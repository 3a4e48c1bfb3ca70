"""Names and folders that look like a model and are none say what they are, and what to write."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clipfilter_wds import ClipScorer
from clipfilter_wds.models.dual_encoder import ModelError
from tests.support.dual_encoders import make_open_clip
from tests.support.toys import pair, write_shard


def refusal(model: str | Path) -> str:
    with pytest.raises(ModelError) as raised:
        ClipScorer(model, device="cpu")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_bundled_model_that_is_misspelt():
    assert refusal("demotiny") == "there is no model 'demotiny'; did you mean demo-tiny?"


@pytest.mark.parametrize("name", ["hf-hub:org/clip", "open_clip:hf-hub:org/clip"])
def test_hub_ids_as_open_clip_writes_them(name):
    assert "write 'open_clip:org/clip'" in refusal(name)


@pytest.mark.parametrize(
    "address", ["https://huggingface.co/org/clip", "https://hf.co/org/clip/tree/main", "hf://org/clip"]
)
def test_addresses(address):
    assert "write its hub id, 'org/clip'" in refusal(address)


def test_folders_as_open_clip_writes_them(tmp_path):
    assert f"write 'open_clip:{tmp_path}'" in refusal(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    "name",
    ["open_clip:ViT-B-32", "open_clip:ViT-B/32", "open_clip:convnext_base", "ViT-B/32", "ViT-L-14-quickgelu", "RN50x4"],
)
def test_architectures_without_weights(name):
    message = refusal(name)
    assert "names an architecture and no weights" in message
    assert "'open_clip:laion/" in message


@pytest.mark.parametrize("name", ["ViT-B-32.pt", "open_clip:some/where/epoch_5.pt", "model.safetensors", "~/clip.bin"])
def test_files_of_weights(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "a file. A model is a folder or a hub id" in refusal(name)
    here = Path(name.removeprefix("open_clip:")).name
    Path(here).write_bytes(b"weights")
    assert "a file. A model is a folder or a hub id" in refusal(here)
    assert "a file. A model is a folder or a hub id" in refusal(Path(here))


def test_a_folder_with_a_name_like_a_file_or_architecture_is_a_folder(clip_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ViT-B-32", "epoch_5.pt"):
        shutil.copytree(clip_folder, name)
        assert ClipScorer(name, device="cpu").model_name == name
    make_open_clip(tmp_path / "RN50")
    assert ClipScorer("open_clip:RN50", device="cpu").model_name == "open_clip:RN50"


@pytest.mark.parametrize("kind", ["folder", "bundled", "open_clip"])
def test_a_revision_of_what_is_on_no_hub(clip_folder, kind):
    model = {"folder": clip_folder, "bundled": "demo-tiny", "open_clip": f"open_clip:{clip_folder}"}[kind]
    with pytest.raises(
        ModelError, match=r"revision 'main' is for a model of a hub, and .* is none; leave revision out"
    ):
        ClipScorer(model, device="cpu", revision="main")


class TestSentenceTransformers:
    def test_the_folder_of_its_clip_is_named(self, clip_folder, tmp_path):
        shutil.copytree(clip_folder, tmp_path / "0_CLIPModel")
        modules = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        message = refusal(tmp_path)
        assert "sentence-transformers" in message
        assert repr(str(tmp_path / "0_CLIPModel")) in message
        ClipScorer(tmp_path / "0_CLIPModel", device="cpu")

    @pytest.mark.parametrize("modules", ["[]", "{}", "nonsense", "[1]", '[{"path": "1_Pooling"}]'])
    def test_without_one(self, modules, tmp_path):
        (tmp_path / "modules.json").write_text(modules)
        assert "is a folder of sentence-transformers, and no model" in refusal(tmp_path)


@pytest.mark.parametrize("with_model", [False, True])
def test_adapters_are_never_ignored(with_model, clip_folder, tmp_path):
    folder = tmp_path / "lora"
    if with_model:
        shutil.copytree(clip_folder, folder)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/clip"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    message = refusal(folder)
    assert "adapter_config.json" in message
    assert "merge_and_unload" in message


def cache_snapshot(cache: Path, name: str, checkpoint: Path, without: str | None = None) -> Path:
    """A repository as the hub's client keeps it: a snapshot of links to blobs."""
    repository = cache / f"models--{name}"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    shutil.copytree(checkpoint, repository / "blobs")
    for blob in (repository / "blobs").iterdir():
        if blob.name != without:
            (snapshot / blob.name).symlink_to(blob)
    return snapshot


class TestHubCache:
    @pytest.fixture
    def snapshot(self, clip_folder, tmp_path):
        return cache_snapshot(tmp_path, "org--tiny-clip", clip_folder)

    def test_the_folder_of_a_snapshot_is_a_model_folder(self, snapshot):
        assert ClipScorer(snapshot, device="cpu").model_name == str(snapshot)

    @pytest.mark.parametrize("above", [1, 2])
    def test_the_folders_above_it_say_what_they_are(self, snapshot, above):
        message = refusal(snapshot.parents[above - 1])
        assert "'org/tiny-clip'" in message
        assert repr(str(snapshot)) in message

    def test_a_snapshot_that_is_not_complete(self, snapshot):
        (snapshot / "tokenizer.json").resolve().unlink()
        message = refusal(snapshot)
        assert "holds no tokenizer.json" in message
        assert "`hf download org/tiny-clip`" in message

    def test_hub_ids_whose_checkpoints_lack_a_file(self, clip_folder, tmp_path):
        files = ["model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]
        cache_snapshot(tmp_path, "org--whole", clip_folder)
        for number, file in enumerate(files):
            cache_snapshot(tmp_path, f"org--part{number}", clip_folder, without=file)
        code = f"""
from clipfilter_wds import ClipScorer
from clipfilter_wds.models.dual_encoder import ModelError
print(ClipScorer("org/whole", device="cpu").model_name)
for number in range({len(files)}):
    try:
        ClipScorer(f"org/part{{number}}", device="cpu")
    except ModelError as error:
        print(error)
"""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        whole, *messages = done.stdout.splitlines()
        assert whole == "org/whole"
        for number, (file, message) in enumerate(zip(files, messages, strict=True)):
            assert f"'org/part{number}'" in message
            assert file in message
            assert f"`hf download org/part{number} --local-dir FOLDER`" in message

    @pytest.mark.slow
    def test_where_the_hub_does_not_answer_the_cache_is_taken_and_else_one_line_says_so(self, clip_folder, tmp_path):
        cache_snapshot(tmp_path / "cache", "org--whole", clip_folder)
        write_shard(tmp_path / "0.tar", [pair(0)])
        nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "clipfilter_wds", "score", tmp_path / "0.tar", "--num_workers", "0", "--quiet"]

        def score(model):
            options = ["--model", model, "--output", tmp_path / model]
            environment = {**os.environ, **nowhere}
            return subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)

        done = score("org/whole")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        refused = score("org/other")
        assert (refused.returncode, refused.stdout) == (2, "")
        says = r"can't load 'org/other' from the Hugging Face hub: it can't be reached, and the cache holds no copy of "
        assert re.fullmatch(rf"clipfilter-wds: {says}the model\.[^\n]*\n", refused.stderr)
