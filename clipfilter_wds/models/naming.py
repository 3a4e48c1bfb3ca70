"""Says what a name or folder is that looks like a model and is none."""

import json
import os
import re
from pathlib import Path

from clipfilter_wds.models.dual_encoder import ModelError

#: In front of the hub id or folder of an open_clip model.
OPEN_CLIP = "open_clip:"

#: What open_clip itself writes in front of hub ids and folders.
_SCHEMAS_OF_OPEN_CLIP = ("hf-hub:", "local-dir:")

_HUB_ADDRESSES = ("https://huggingface.co/", "https://hf.co/", "hf://")

#: Architectures, as OpenAI and open_clip call them: ViT-B/32, ViT-L-14-quickgelu, RN50x4.
_ARCHITECTURE = re.compile(r"(ViT-(S|B|L|H|g|bigG|SO400M)[-/]\d\d|RN\d+(x\d+)?).*")

_WEIGHT_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".onnx", ".gguf", ".npz")

_EXAMPLE = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
_HUB_IDS = f"give a hub id, such as 'openai/clip-vit-base-patch32' or '{OPEN_CLIP}{_EXAMPLE}'"


def check_name(name: str) -> None:
    """Refuse names that other programs use for models.

    Raises:
        ModelError: When it is an address, has a prefix of open_clip's, or names an architecture or a file.
    """
    place = name.removeprefix(OPEN_CLIP)
    for schema in _SCHEMAS_OF_OPEN_CLIP:
        if place.startswith(schema):
            meant = place.removeprefix(schema) or "HUB_ID"
            raise ModelError(
                f"model is {name!r}, as open_clip writes it; write {OPEN_CLIP + meant!r}, or {meant!r} alone where it "
                "holds a model of transformers too"
            )
    for address in _HUB_ADDRESSES:
        if place.startswith(address):
            hub_id = "/".join(place.removeprefix(address).split("/")[:2])
            raise ModelError(f"model is {name!r}, an address; write its hub id, {hub_id!r}")
    path = Path(os.path.expanduser(place))  # noqa: PTH111 - Path's own fails on a user that there is not
    if path.is_file() or (place.endswith(_WEIGHT_FILES) and not path.is_dir()):
        raise ModelError(
            f"model is {name!r}, a file. A model is a folder or a hub id, with config and tokenizer beside weights in "
            f"safetensors; pickled weights (.pt, .bin) can run any code and are never loaded: {_HUB_IDS}"
        )
    if path.is_dir():
        return
    if _ARCHITECTURE.fullmatch(place) or (name.startswith(OPEN_CLIP) and "/" not in place):
        raise ModelError(f"model is {name!r}, which names an architecture and no weights: {_HUB_IDS}")


def check_folder(folder: Path, prefix: str = "") -> None:
    """Refuse folders that hold a model in another form, or none.

    Args:
        folder: Has no config of the kind that is looked for, or an adapter beside it.
        prefix: Goes before the folder that is recommended.

    Raises:
        ModelError: When it is not there, a folder of the hub cache or of sentence-transformers, or an adapter.
    """
    if not folder.is_dir():
        raise ModelError(
            f"there is no model folder {str(folder)!r}; give a folder with config.json and model.safetensors, or "
            f"'demo-tiny', or {_HUB_IDS.removeprefix('give ')}"
        )
    if hub_id := _cached_id(folder):
        snapshots = sorted((folder if folder.name == "snapshots" else folder / "snapshots").glob("*"))
        inside = f", or the folder {str(snapshots[-1])!r}" if snapshots else ""
        raise ModelError(f"{str(folder)!r} is where the hub cache keeps {hub_id!r}: give {prefix + hub_id!r}{inside}")
    if (folder / "adapter_config.json").is_file():
        raise adapter_error(str(folder))
    if (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(f"{str(folder)!r} is a folder of sentence-transformers{_clip_within(folder)}")


def adapter_error(name: str) -> ModelError:
    """What to tell the user of a checkpoint with an adapter."""
    return ModelError(
        f"{name!r} holds an adapter (adapter_config.json, such as LoRA's), and no adapter is ever applied: merge it "
        "into its model with PeftModel.merge_and_unload(), and save that with save_pretrained(folder)"
    )


def hub_id_of(folder: Path) -> str | None:
    """The hub id whose snapshot in the hub cache ``folder`` is; None where it is another folder."""
    return _id_in(folder.parent.parent.name) if folder.parent.name == "snapshots" else None


def _cached_id(folder: Path) -> str | None:
    """The hub id that ``folder``, ``models--owner--name`` or the ``snapshots`` in it, is the cache of."""
    return _id_in((folder.parent if folder.name == "snapshots" else folder).name)


def _id_in(name: str) -> str | None:
    kind, _, rest = name.partition("--")
    return rest.replace("--", "/") if kind == "models" and rest else None


def _clip_within(folder: Path) -> str:
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
        places = [folder / module["path"] for module in modules if (folder / module["path"] / "config.json").is_file()]
    except (ValueError, TypeError, KeyError):
        places = []
    if not places:
        return ", and no model of it is an image-caption model in the form of transformers"
    return f", whose own model is in {str(places[0])!r}: give that folder"
