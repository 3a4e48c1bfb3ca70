"""Finds the files of a checkpoint, and says which are missing and how to get them."""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from clipfilter_wds.models.dual_encoder import ModelError, ModelSource
from clipfilter_wds.models.naming import adapter_error, hub_id_of

_TOKENIZER_CONFIG, _TOKENIZER = "tokenizer_config.json", "tokenizer.json"

#: The files that hold a vocabulary where there is no tokenizer.json; each a set that is of use as a whole only.
_VOCABULARIES = (
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("tokenizer.model",),
)

_WEIGHTS, _WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_PROCESSOR, _PREPROCESSOR = "processor_config.json", "preprocessor_config.json"

#: What image processors have defaults for that hardly fit, and every published checkpoint gives.
_IMAGE_SETTINGS = ("size", "resample", "image_mean", "image_std")

#: Weights that scale cosines in training; cosines themselves don't need them.
UNUSED_WEIGHTS = ("logit_scale", "logit_bias")


@dataclass(frozen=True)
class Checkpoint:
    """The files of a model, in a folder or on the hub."""

    source: ModelSource

    def path(self, file: str) -> Path | None:
        """Where ``file`` is on this disk, downloaded if need be; None when the checkpoint doesn't have it."""
        place = self.source.place
        if isinstance(place, Path):
            return place / file if (place / file).is_file() else None
        try:
            return Path(hf_hub_download(place, file, revision=self.source.revision))
        except EntryNotFoundError:
            return None

    def has(self, *files: str) -> bool:
        """Whether it has all of them."""
        return all(self.path(file) is not None for file in files)

    def read(self, file: str) -> dict[str, Any]:
        """The JSON object in ``file``, ``{}`` when there is no such file.

        Raises:
            ModelError: When it holds something else.
        """
        path = self.path(file)
        if path is None:
            return {}
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise ModelError(f"can't load {self.source.name!r}: {file} is no JSON ({error})") from error
        if not isinstance(content, dict):
            raise ModelError(f"can't load {self.source.name!r}: {file} holds no JSON object")
        return content

    def lacks(self, file: str, purpose: str) -> ModelError:
        """What to tell the user when ``file`` is missing; ``purpose`` says what it is for."""
        place = self.source.place
        lacks = f"{self.source.name!r} holds no {file}, {purpose}, and nothing else may stand in for it"
        if not isinstance(place, Path):
            download = f"`hf download {place} --local-dir FOLDER`"
            return ModelError(f"{lacks}: add it to a copy of the checkpoint ({download}), and give that folder")
        if hub_id := hub_id_of(place):
            return ModelError(
                f"{lacks}: this folder of the hub cache is incomplete; complete it: `hf download {hub_id}`"
            )
        download = f"`hf download HUB_ID --local-dir {place}`"
        return ModelError(f"{lacks}: copy it from where the checkpoint comes from ({download})")

    def unusable_tokenizer(self, error: Exception) -> ModelError:
        """What to tell the user when the files of the tokenizer don't fit each other."""
        files = [_TOKENIZER, _TOKENIZER_CONFIG, *(file for files in _VOCABULARIES for file in files)]
        reason = " ".join(str(error).split()) or type(error).__name__
        return ModelError(
            f"can't make a tokenizer of {', '.join(filter(self.has, files))} of {self.source.name!r}: {reason}. "
            "Copy all its files from where the checkpoint comes from"
        )


def check_weights(checkpoint: Checkpoint) -> None:
    """Check that all files of weights are there.

    Raises:
        ModelError: When one is missing, or the weights are pickled.
    """
    place = checkpoint.source.place
    if checkpoint.has(_WEIGHTS):
        return
    if checkpoint.has(_WEIGHTS_INDEX):
        parts = sorted(set(checkpoint.read(_WEIGHTS_INDEX).get("weight_map", {}).values()))
        for part in parts:
            if not checkpoint.has(part):
                raise checkpoint.lacks(part, f"one of the {len(parts)} files of its weights")
    # The hub converts pickled weights by itself, and transformers finds what it has made.
    elif isinstance(place, Path):
        if any(place.glob("model-*-of-*.safetensors")):
            raise checkpoint.lacks(_WEIGHTS_INDEX, "which says what is in each of the files of its weights")
        if not any(place.glob("*.bin")):
            raise checkpoint.lacks(_WEIGHTS, "its weights")
        raise ModelError(
            f"{str(place)!r} holds no *.safetensors weights ({_WEIGHTS}). Pickled ones (pytorch_model.bin) can run any "
            "code and are never loaded; save them again with model.save_pretrained(folder), which writes safetensors"
        )


def check_loaded_weights(source: ModelSource, file: str, missing: Iterable[str], reshaped: Iterable[str]) -> None:
    """Check that every weight that embeddings depend on came from the checkpoint.

    Args:
        source: For messages.
        file: That of the weights.
        missing: Weights of the model that are not in the file.
        reshaped: Weights that have another shape there than the model's config says.

    Raises:
        ModelError: When there is one.
    """
    for weights, fault in ((missing, "are not in"), (reshaped, "have another shape in")):
        wrong = sorted(weight for weight in weights if weight.rpartition(".")[2] not in UNUSED_WEIGHTS)
        if wrong:
            raise ModelError(
                f"can't load {source.name!r}: {len(wrong)} of its weights {fault} {file} (such as {wrong[0]!r}), so "
                "scores would be random; take config and weights of one model, and all of them"
            )


def temperature_of(model: nn.Module, missing: Collection[str]) -> float | None:
    """What the model divided cosines by in training, 1 / exp(logit_scale); None where the checkpoint does not tell.

    Args:
        model: With its weights.
        missing: Weights of it that are not in the checkpoint.
    """
    scale = getattr(model, "logit_scale", None)
    if not isinstance(scale, Tensor) or scale.numel() != 1 or "logit_scale" in missing:
        return None
    temperature = float(torch.exp(-scale.detach().double()))
    return temperature if 0.0 < temperature < math.inf else None


def check_towers(checkpoint: Checkpoint) -> None:
    """Check that the config says what both towers are like, and that nothing but it does.

    Raises:
        ModelError: When it leaves out a tower, whose sizes would be a library's, or there is an adapter.
    """
    name, config = checkpoint.source.name, checkpoint.read("config.json")
    for tower in ("text_config", "vision_config"):
        if not (config.get(tower) or config.get(f"{tower}_dict")):
            raise ModelError(
                f"config.json of {name!r} has no {tower}; copy it again from where the checkpoint comes from"
            )
    if checkpoint.has("adapter_config.json"):
        raise adapter_error(name)


def check_image_settings(checkpoint: Checkpoint) -> None:
    """Check that the checkpoint says how its images are prepared.

    Raises:
        ModelError: When the file is missing, or a setting that a library would replace by its default.
    """
    file, settings = _PROCESSOR, checkpoint.read(_PROCESSOR).get("image_processor")
    if not settings:
        file, settings = _PREPROCESSOR, checkpoint.read(_PREPROCESSOR)
    if not settings:
        raise checkpoint.lacks(_PREPROCESSOR, f"which says how its images are prepared ({_PROCESSOR} may as well)")
    if absent := [setting for setting in _IMAGE_SETTINGS if settings.get(setting) is None]:
        raise ModelError(
            f"{file} of {checkpoint.source.name!r} gives no {' and no '.join(absent)}, so its images can't be prepared "
            "as in its training; add what the model was trained with"
        )


def check_tokenizer_files(checkpoint: Checkpoint) -> None:
    """Check that the checkpoint has a tokenizer, before a library makes an empty one.

    Raises:
        ModelError: When there is no vocabulary, or a file that says how captions are split.
    """
    if not (checkpoint.has(_TOKENIZER) or any(checkpoint.has(*files) for files in _VOCABULARIES)):
        older = "; ".join(map(" and ".join, _VOCABULARIES))
        raise checkpoint.lacks(_TOKENIZER, f"its tokenizer, nor what older ones consist of ({older})")
    if not checkpoint.has(_TOKENIZER_CONFIG):
        raise checkpoint.lacks(
            _TOKENIZER_CONFIG,
            "which says how captions are split and where they are cut (tokenizer_class, model_max_length)",
        )


def check_vocabulary(checkpoint: Checkpoint, vocab_files: Mapping[str, str]) -> None:
    """Check that a loaded tokenizer was made from files of the checkpoint.

    Args:
        checkpoint: Where it is from.
        vocab_files: The ``vocab_files_names`` of the tokenizer's class.

    Raises:
        ModelError: When it has neither a tokenizer.json nor all of the others.
    """
    others = [file for kind, file in vocab_files.items() if kind != "tokenizer_file"] or ["tokenizer.model"]
    if ("tokenizer_file" in vocab_files and checkpoint.has(_TOKENIZER)) or checkpoint.has(*others):
        return
    missing = next(file for file in others if not checkpoint.has(file))
    if "tokenizer_file" in vocab_files:
        raise checkpoint.lacks(_TOKENIZER, f"its tokenizer, nor {missing}, of which one can be made")
    raise checkpoint.lacks(missing, "the vocabulary of its tokenizer")
