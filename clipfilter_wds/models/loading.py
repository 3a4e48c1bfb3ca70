"""Loads a dual encoder by name, with the library that it is of."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging

from clipfilter_wds.models.dual_encoder import DualEncoder, ModelError, ModelSource
from clipfilter_wds.models.hugging_face import load_hugging_face
from clipfilter_wds.models.naming import OPEN_CLIP, check_name
from clipfilter_wds.models.open_clip import load_open_clip
from clipfilter_wds.models.out_of_memory import is_out_of_memory
from clipfilter_wds.options import did_you_mean

#: Models that come with the package, and their folders.
BUNDLED_MODELS = {"demo-tiny": Path(__file__).parents[1] / "demo" / "tiny_clip"}


def load_model(model: str | Path, revision: str | None) -> DualEncoder:
    """Load a model with the library that its name says.

    Raises:
        ModelError: When there is no such model, it lacks a part, or it can't be used.
    """
    name, place = str(model), model
    load = load_hugging_face
    if name.startswith(OPEN_CLIP):
        load, place = load_open_clip, name.removeprefix(OPEN_CLIP)
    if name in BUNDLED_MODELS:
        place = BUNDLED_MODELS[name]
    else:
        check_name(name)
        _check_spelling(name)
    if _is_folder(place):
        place = Path(place).expanduser()
        if revision is not None:
            raise ModelError(f"revision {revision!r} is for a model of a hub, and {name!r} is none; leave revision out")
    try:
        with _without_bars(), torch.device("cpu"):  # whatever the script's default is
            return load(ModelSource(name=name, place=place, revision=revision))
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # what a library makes of settings that can't be is anything
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or "no reason given"
        raise ModelError(
            f"can't load {name!r}: its config files hold a setting that can't be used, or lack one: {reason} "
            f"({type(error).__name__})"
        ) from error


def _check_spelling(name: str) -> None:
    """Refuse what is no hub id, which is ``owner/name``, and nearly the name of a bundled model."""
    if "/" not in name and not Path(name).is_dir() and (hint := did_you_mean(name, BUNDLED_MODELS, "{}")):
        raise ModelError(f"there is no model {name!r}{hint}")


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers and the hub's client from drawing bars of their own."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _is_folder(model: str | Path) -> bool:
    """Whether ``model`` can only mean a folder: it is one, or it is written like a path and not like ``owner/name``."""
    text = str(model)
    return isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or Path(text).is_dir()
