"""Loads a dual encoder by name, whatever library it is of."""

from pathlib import Path

from clipfilter_wds.models.dual_encoder import DualEncoder
from clipfilter_wds.models.hugging_face import load_hugging_face
from clipfilter_wds.models.open_clip import load_open_clip

#: Models that are part of the package, by the name that stands for their folder.
BUNDLED_MODELS = {"demo-tiny": Path(__file__).parents[1] / "demo" / "tiny_clip"}

#: Before a hub id or a folder: a model of open_clip.
_OPEN_CLIP = "open_clip:"


def _is_folder(model: str | Path) -> bool:
    """Whether ``model`` can only mean a folder: it is one, or it is written like a path and not like ``owner/name``."""
    text = str(model)
    return isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or Path(text).is_dir()


def load_model(model: str | Path, revision: str | None) -> DualEncoder:
    """Load from whichever library the name says.

    Raises:
        ModelError: When there is no such model, or it can't be used.
    """
    name, source = str(model), model
    load = load_hugging_face
    if name.startswith(_OPEN_CLIP):
        load, source = load_open_clip, name.removeprefix(_OPEN_CLIP)
    if name in BUNDLED_MODELS:
        source = BUNDLED_MODELS[name]
    elif _is_folder(source):
        source = Path(source).expanduser()
    return load(name, source, revision)
