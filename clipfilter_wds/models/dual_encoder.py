"""Defines a dual encoder: an image tower and a text tower whose embeddings can be compared, of any library."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from clipfilter_wds.preprocess.clip import ClipPreprocess

_NUM_CHANNELS = 3


class ModelError(ValueError):
    """A model that can't be used; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: What the user called it, for messages.
        place: A hub id, or a folder.
        revision: Branch, tag or commit of a hub model.
    """

    name: str
    place: str | Path
    revision: str | None = None

    def error(self, error: Exception, *, folder: str = "a local folder") -> ModelError:
        """What to tell the user when loading failed; ``folder`` is what can be given in place of a hub id."""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(self.place, Path):
            return ModelError(f"can't load {self.name!r}: {reason}")
        return ModelError(
            f"can't load {self.name!r} from the Hugging Face hub: {reason} Check the name and the connection; where "
            f"there is none, give {folder} (made elsewhere with `hf download {self.place} --local-dir FOLDER`)"
        )


class Towers(nn.Module):
    """The two towers of some library's model.

    Attributes:
        model: The library's own module.
        normalizes: Whether the image tower takes pixels in 0..255, and normalises them itself.
    """

    model: Any
    normalizes = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def image_features(self, pixels: Tensor) -> Tensor:
        """Pixels ``[N, 3, H, W]``, normalised, or else uint8 -> embeddings ``[N, D]``, not normalised."""

    @abstractmethod
    def text_features(self, input_ids: Tensor) -> Tensor:
        """int64 ``[N, L]`` -> embeddings ``[N, D]``, not normalised."""

    def train(self, mode: bool = True) -> Self:  # as torch has it
        """Stay in evaluation, also in a module that is trained: some text towers have dropout."""
        return super().train(mode=False)

    def compile(self, *args: Any, with_text: bool = True, **options: Any) -> None:
        """Compile each tower, or the image tower alone, since the module as a whole is never called."""
        # On this instance, as Module.compile does it for the module as a whole.
        self.image_features = torch.compile(self.image_features, *args, **options)  # type: ignore[method-assign]
        if with_text:
            self.text_features = torch.compile(self.text_features, *args, **options)  # type: ignore[method-assign]

    def weights_hash(self) -> str:
        """SHA-256 of the names and values of all weights, whatever files they came in."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class DualEncoder:
    """A loaded model with all that it takes to use it.

    Attributes:
        family: The kind of model; part of the fingerprint.
        towers: In float32, on the CPU.
        preprocess: Samples -> what the towers take, except for rescaling and normalising pixels.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
        rescale: What pixels in 0..255 are multiplied by.
        width: Of the wider tower.
        temperature: 1 / exp(logit_scale), what cosines are divided by in training; None where the checkpoint has none.

    Raises:
        ValueError: When pixels can't be normalised so.
    """

    family: str
    towers: Towers
    preprocess: ClipPreprocess
    mean: Sequence[float]
    std: Sequence[float]
    rescale: float = 1 / 255
    width: int
    temperature: float | None

    @property
    def pixel_mean(self) -> Tensor:
        """float32 ``[3]``, of pixels in 0..255, as CLIPImageProcessor fuses it out of rescale and normalise."""
        return torch.tensor(self.mean, dtype=torch.float32, device="cpu") * (1.0 / self.rescale)

    @property
    def pixel_std(self) -> Tensor:
        """Likewise."""
        return torch.tensor(self.std, dtype=torch.float32, device="cpu") * (1.0 / self.rescale)

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            is_list = isinstance(values, list | tuple) and len(values) == _NUM_CHANNELS
            if not is_list or not all(isinstance(value, int | float) for value in values):
                raise ValueError(f"the {name} of pixels is {values!r}; it must be three numbers")
        if not all(self.std) or not self.rescale > 0:
            raise ValueError(f"pixels can't be divided by std {self.std!r} or multiplied by {self.rescale!r}")
