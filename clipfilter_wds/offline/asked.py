"""Compares what options say of how to score with how score tables were made, without the model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipfilter_wds.models.config import ScorerConfig
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.scores.selection import Choice

#: Options of the model that decide scores, and that a fingerprint names. A revision is in the hash of the weights.
_OF_MODEL = ("model", "precision", "reduce", "flip", "fast_decode", "resize_on_device")


def check_asked(found: Fingerprint, config: RewriteConfig, scorer: ScorerConfig | None = None) -> None:
    """Refuse what was asked for in vain. An option at its default asks for nothing.

    Args:
        found: What the scores that ``config`` names depend on.
        config: Where image and caption are.
        scorer: The model.

    Raises:
        ValueError: Naming the options that differ, with both values.
    """
    differences = [*_of_layout(found, config), *(() if scorer is None else _of_model(found, scorer))]
    differ = [f"{name} {_shown(there)} there, {_shown(here)} here" for name, there, here in differences]
    if differ:
        raise ValueError(
            f"the scores in {str(config.scores)!r} were made with other settings ({'; '.join(differ)}), and are taken "
            "as they are; leave these options out, or score again with them"
        )


def expected_fingerprint(found: Fingerprint, config: ScoreConfig, scorer: ScorerConfig | None) -> Fingerprint:
    """The fingerprint of a run, if its model is the one that scored ``found`` and is loaded as it was there."""
    choice = config.choice if isinstance(config, RewriteConfig) else Choice()
    known: dict[str, Any] = {}
    for name in _OF_MODEL[1:] if scorer is not None else ():
        known[name] = getattr(scorer, name)
    if known.get("precision") == "auto":
        del known["precision"]
    known |= config.layout.fingerprint
    known |= {} if choice.subset is None else {"subset": choice.subset.digest}
    known |= {} if config.limit is None else {"limit": config.limit}
    return {name: value for name, value in found.items() if name not in ("image", "subset", "limit")} | known


def is_other_model(found: Fingerprint, scorer: ScorerConfig) -> bool:
    """Whether the model has another name there. Its weights may still be the same."""
    return str(scorer.model) != found["model"] and not _is_same_folder(scorer.model, found["model"])


def _of_layout(found: Fingerprint, config: RewriteConfig) -> Iterator[tuple[str, Any, Any]]:
    for name, usual in (("caption", "txt"), ("image", None)):
        there, here = found.get(name, usual), getattr(config, name)
        if here not in (usual, there):
            yield name, there, here


def _of_model(found: Fingerprint, scorer: ScorerConfig) -> Iterator[tuple[str, Any, Any]]:
    usual = ScorerConfig()
    for name in _OF_MODEL:
        here, by_default = getattr(scorer, name), getattr(usual, name)
        there = found.get(name, by_default)
        if here not in (by_default, there) and not (name == "model" and _is_same_folder(here, there)):
            yield name, there, str(here) if isinstance(here, Path) else here


def _is_same_folder(one: str | Path, other: str) -> bool:
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
