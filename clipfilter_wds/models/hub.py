"""Takes a hub model from the cache where the hub can't be reached, before a library tries again and again."""

from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants, get_session, try_to_load_from_cache

from clipfilter_wds.models.dual_encoder import ModelSource

#: Seconds to wait for the hub's first answer.
_SECONDS = 5.0
#: Either is in the root of every model's repository.
_CONFIGS = ("config.json", "open_clip_config.json")


def cached_where_offline(source: ModelSource) -> ModelSource:
    """The model as it is, or where it is one of a hub that does not answer, its copy in the cache.

    Raises:
        ModelError: When the hub can't be reached and the cache has no copy.
    """
    if isinstance(source.place, Path) or _answers():
        return source
    for config in _CONFIGS:
        found = try_to_load_from_cache(source.place, config, revision=source.revision)
        if isinstance(found, str):
            return replace(source, place=Path(found).parent, revision=None)
    raise source.error(ConnectionError("it can't be reached, and the cache holds no copy of the model."))


def _answers() -> bool:
    """Whether the hub says anything at all, or need not."""
    if constants.HF_HUB_OFFLINE:
        return True  # the libraries look into the cache at once then, and nowhere else
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # noqa: BLE001  # its client has errors of its own
        return False
    return True
