"""SECURITY.md and "secure by default", line by line, each with a file that does harm where the line is broken."""

import io
import json
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset
from clipfilter_wds.models.dual_encoder import ModelError
from tests.support.outputs import rewrite
from tests.support.toys import encoded, pair, photo, tar_members, write_shard


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def touched(tmp_path) -> Path:
    """The file that must never be there."""
    return tmp_path / "harm-was-done"


# --- no pickle, .pyd, .pth or .npy-object member is ever decoded ---


def test_no_member_that_can_run_code_is_ever_decoded(command, clip_folder, touched, tmp_path):
    harm = pickle.dumps(Harm(touched))
    array = io.BytesIO()
    np.save(array, np.array([Harm(touched)], dtype=object), allow_pickle=True)
    members = dict.fromkeys(("pyd", "pickle", "pkl", "pth", "pt", "bin"), harm) | {"npy": array.getvalue()}
    samples = [{**pair(1), **members}, {"pyd": harm, "txt": b"a caption"}, {"jpg": harm, "txt": b"a caption"}]
    samples += [{"jpg": pair(1)["jpg"], "txt": harm}]
    shard = write_shard(tmp_path / "0.tar", samples)
    assert rewrite(command, clip_folder, shard, tmp_path / "out")[0] == 0
    scorer = ClipScorer(clip_folder, device="cpu")
    dataset = ClipWebDataset(shard, scorer.preprocess, columns=list(members))
    batches = list(ClipFilterLoader(dataset, scorer, threshold=None))
    assert {name: batches[0][name][0] for name in members} == {**members, "npy": None}
    assert not touched.exists()
    # They go through as they are, and do harm where they are decoded.
    kept = dict(tar_members(tmp_path / "out" / "0.tar"))
    assert {kept[f"000000000.{name}"] for name in members} == set(members.values())
    pickle.loads(kept["000000000.pyd"])
    assert touched.exists()


# --- pipe: URLs run a shell and are refused ---


def test_a_pipe_is_never_run_unasked(command, clip_folder, touched, tmp_path):
    harm = f"pipe:touch {touched}"
    (tmp_path / "list.txt").write_text(f"{harm}\n")
    for shards in (harm, f"@{tmp_path}/list.txt", f"{tmp_path}/x.tar,{harm}", f"file://{tmp_path}/x.tar::{harm}"):
        code, said = rewrite(command, clip_folder, shards, tmp_path / "out")
        assert code == 2, said
    scorer = ClipScorer(clip_folder, device="cpu")
    with pytest.raises(ValueError, match="allow_pipe=True"):
        ClipWebDataset(harm, scorer.preprocess)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": harm, "caption": "a"}) + "\n")
    command("table", tmp_path / "rows.jsonl", "--output", tmp_path / "kept.jsonl", "--model", clip_folder)
    assert not touched.exists()
    dataset = ClipWebDataset(harm, scorer.preprocess, allow_pipe=True)
    list(dataset)
    assert touched.exists()


# --- weights load as safetensors only, and no code comes with a model ---


def test_pickled_weights_are_never_loaded(clip_folder, touched, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(clip_folder, folder)
    (folder / "model.safetensors").unlink()
    torch.save(Harm(touched), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors weights"):
        ClipScorer(folder, device="cpu")
    # Nor when other safetensors lie beside them.
    shutil.copy(clip_folder / "model.safetensors", folder / "other.safetensors")
    with pytest.raises(ModelError):
        ClipScorer(folder, device="cpu")
    assert not touched.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert touched.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_that_comes_with_a_model_is_never_run(clip_folder, touched, tmp_path, file):
    folder = tmp_path / "model"
    shutil.copytree(clip_folder, folder)
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(touched)!r}).touch()\nclass Evil: pass\n")
    config = json.loads((folder / file).read_bytes()) if (folder / file).exists() else {}
    classes = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor")
    config["auto_map"] = {**dict.fromkeys(classes, "evil.Evil"), "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / file).write_text(json.dumps(config))
    with suppress(ModelError):  # refused, or loaded without the code: both will do
        ClipScorer(folder, device="cpu")
    assert not touched.exists()


# --- Pillow opens an allow-list of formats, never plug-ins that start programs ---


def test_ghostscript_is_never_started(command, clip_folder, touched, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {touched}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    eps = encoded(photo(1), "EPS")
    # Pillow knows a shortcut for its own files, which this is not.
    eps = eps.replace(b"%ImageData", b"%NoImageData").replace(b"%%BeginBinary", b"%%NoBinary")
    shard = write_shard(tmp_path / "0.tar", [{extension: eps, "txt": b"a"} for extension in ("jpg", "png", "tiff")])
    assert "unreadable_image" in rewrite(command, clip_folder, shard, tmp_path / "out")[1]
    assert not touched.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011  # our ghostscript draws nothing
        Image.open(io.BytesIO(eps)).load()
    assert touched.exists()


# --- caps on pixels and on member size: test_hostile_images.py, test_hostile_tars.py, test_samples.py ---


# --- output names can't leave the output folder ---


@pytest.mark.parametrize("name", ["...tar", "..tar", ".tar"])
def test_a_shard_whose_name_would_leave_the_folder_is_refused(command, clip_folder, tmp_path, name):
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in" / name, [pair(1)])
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    code, said = rewrite(command, clip_folder, tmp_path / "in" / name, tmp_path / "a" / "out")
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert all(path.is_relative_to(tmp_path / "a" / "out") for path in written)
    if name == "...tar":
        assert (code, "no base name" in said) == (2, True)


def test_an_output_file_that_is_a_link_is_replaced_and_not_written_through(command, clip_folder, tmp_path):
    shard = write_shard(tmp_path / "in" / "0.tar", [pair(1)])
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.tar").symlink_to(tmp_path / "precious")
    assert rewrite(command, clip_folder, shard, tmp_path / "out")[0] == 0
    assert (tmp_path / "precious").read_text() == "precious"
    assert len(tar_members(tmp_path / "out" / "0.tar")) == 2


# --- escape codes never reach the terminal: test_console.py ---
