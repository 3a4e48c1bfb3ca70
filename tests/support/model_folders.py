"""Makes model folders of every form that checkpoints are published in, from the small models of the tests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import AutoModel, BertTokenizer, XLMRobertaTokenizer

from clipfilter_wds.models.loading import BUNDLED_MODELS
from tests.support.dual_encoders import (
    FAMILIES,
    make_altclip,
    make_chinese_clip,
    make_open_clip,
    train_sentencepiece,
)
from tests.support.toys import make_clip


def older_clip(folder: Path) -> Path:
    """As OpenAI's: preprocessor_config.json, and the tokenizer twice, as tokenizer.json and vocab.json, merges.txt."""
    shutil.copytree(BUNDLED_MODELS["demo-tiny"], folder)
    model = json.loads((folder / "tokenizer.json").read_bytes())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    tokens = {name: token for name, token in config.items() if name.endswith("_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    return folder


def oldest_clip(folder: Path) -> Path:
    """As in 2021: vocab.json with merges.txt alone."""
    (older_clip(folder) / "tokenizer.json").unlink()
    return folder


def older_chinese_clip(folder: Path) -> Path:
    """The tokenizer twice, as tokenizer.json and as vocab.txt."""
    make_chinese_clip(folder)
    vocabulary = BertTokenizer.from_pretrained(folder).get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n")
    return folder


def cased_chinese_clip(folder: Path) -> Path:
    """vocab.txt alone, and a tokenizer_config.json that turns off the default of writing small letters."""
    (older_chinese_clip(folder) / "tokenizer.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "do_lower_case": False}))
    return folder


def older_altclip(folder: Path) -> Path:
    """The tokenizer twice, as tokenizer.json and as sentencepiece.bpe.model."""
    make_altclip(folder)
    vocabulary = train_sentencepiece(folder / "sentencepiece.bpe.model", vocab_size=100)
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    (folder / "tokenizer.json").unlink()
    XLMRobertaTokenizer.from_pretrained(vocabulary.parent).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def sharded_clip(folder: Path) -> Path:
    """Weights in several files, with an index."""
    make_clip(folder)
    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def open_clip_with_tokenizer(folder: Path) -> Path:
    """A tokenizer of transformers beside a model of open_clip."""
    make_open_clip(folder)
    clip = make_clip(folder.parent / "clip")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(clip / file, folder)
    config = json.loads((folder / "open_clip_config.json").read_bytes())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "somewhere/else"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


#: Per kind, how to make one, and the prefix of its name.
FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "clip": (make_clip, ""),
    **{family: (make, prefix) for family, (make, _, prefix) in FAMILIES.items() if "squashed" not in family},
    "older clip": (older_clip, ""),
    "oldest clip": (oldest_clip, ""),
    "sharded clip": (sharded_clip, ""),
    "older chinese_clip": (older_chinese_clip, ""),
    "cased chinese_clip": (cased_chinese_clip, ""),
    "older altclip": (older_altclip, ""),
    "open_clip with tokenizer": (open_clip_with_tokenizer, "open_clip:"),
}
