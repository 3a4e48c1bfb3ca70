"""Takes a hub model from the cache where it is whole there, or where the hub does not answer."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants, get_session, try_to_load_from_cache

from clipfilter_wds.models.checkpoint import Checkpoint
from clipfilter_wds.models.dual_encoder import ModelError, ModelSource

#: Seconds to wait for the hub's first answer.
_SECONDS = 5.0
#: Either is in the root of every model's repository.
_CONFIGS = ("config.json", "open_clip_config.json")


def cached_copy(source: ModelSource, check: Callable[[Checkpoint], None], replaceable: Sequence[str]) -> ModelSource:
    """The model in the cache, if it is one of the hub and whole there, or the hub does not answer; else as it is.

    Args:
        source: The model.
        check: Raises ``ModelError`` when a checkpoint lacks a file that loading needs.
        replaceable: Files in whose place loading may take another one: where such a file is not in the cache, the cache
            must know that the hub does not have it either.

    Raises:
        ModelError: When the hub can't be reached and the cache has no copy.
    """
    if isinstance(source.place, Path) or constants.HF_HUB_OFFLINE:
        return source  # offline, the libraries look into the cache at once, and nowhere else
    cached = _snapshot(source, source.place)
    if cached is not None and _is_whole(source, cached, check, replaceable):
        return cached
    if _answers():
        return source
    if cached is None:
        raise source.error(ConnectionError("it can't be reached, and the cache holds no copy of the model."))
    return cached


def _snapshot(source: ModelSource, hub_id: str) -> ModelSource | None:
    for config in _CONFIGS:
        found = try_to_load_from_cache(hub_id, config, revision=source.revision)
        if isinstance(found, str):
            return replace(source, place=Path(found).parent, revision=None)
    return None


def _is_whole(
    source: ModelSource, cached: ModelSource, check: Callable[[Checkpoint], None], replaceable: Sequence[str]
) -> bool:
    try:
        check(Checkpoint(cached))
    except ModelError:
        return False
    return all(try_to_load_from_cache(str(source.place), file, revision=source.revision) for file in replaceable)


def _answers() -> bool:
    """Whether the hub says anything at all."""
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # noqa: BLE001  # its client has errors of its own
        return False
    return True
