"""Each line that the page on inputs says of model folders is true."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipfilter_wds import ClipScorer
from clipfilter_wds.models.dual_encoder import ModelError
from tests.support.dual_encoders import make_open_clip
from tests.support.model_folders import (
    older_altclip,
    older_chinese_clip,
    oldest_clip,
    open_clip_with_tokenizer,
    sharded_clip,
)
from tests.support.pages import lines_of
from tests.support.toys import make_clip

CHECKS: dict[str, Callable[[Path], None]] = {}


def line(start: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """The check of the line that starts so; it is given an empty folder."""

    def register(check: Callable[[Path], None]) -> Callable[[Path], None]:
        CHECKS[start] = check
        return check

    return register


def loads(model: str | Path) -> None:
    ClipScorer(model, device="cpu")


def is_refused(model: str | Path, *says: str) -> None:
    with pytest.raises(ModelError) as raised:
        ClipScorer(model, device="cpu")
    assert all(part in str(raised.value) for part in says), raised.value


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}))


def change_text_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    change_json(folder / "config.json", text_config={**config["text_config"], **values})


@line("`config.json`")
def config(folder):
    (make_clip(folder / "m") / "config.json").unlink()
    is_refused(folder / "m", "config.json")


@line("`model.safetensors`, or")
def weights(folder):
    (make_clip(folder / "m") / "model.safetensors").unlink()
    is_refused(folder / "m", "model.safetensors")
    loads(sharded_clip(folder / "s"))
    sorted((folder / "s").glob("model-*"))[0].unlink()
    is_refused(folder / "s", "model-00001-of-")


@line("`preprocessor_config.json`, or")
def preprocessor(folder):
    settings = json.loads((make_clip(folder / "m") / "processor_config.json").read_bytes())["image_processor"]
    (folder / "m" / "processor_config.json").unlink()
    is_refused(folder / "m", "preprocessor_config.json", "processor_config.json")
    needed = {name: settings[name] for name in ("size", "resample", "image_mean", "image_std")}
    for file, content in (
        ("preprocessor_config.json", settings),
        ("processor_config.json", {"image_processor": settings}),
    ):
        (folder / "m" / file).write_text(json.dumps(content))
        loads(folder / "m")
        (folder / "m" / file).unlink()
    for name in needed:
        others = {key: value for key, value in settings.items() if key != name}
        (folder / "m" / "preprocessor_config.json").write_text(json.dumps(others))
        is_refused(folder / "m", "preprocessor_config.json", name)


@line("`tokenizer_config.json`")
def tokenizer_config(folder):
    (make_clip(folder / "m") / "tokenizer_config.json").unlink()
    is_refused(folder / "m", "tokenizer_config.json")


@line("`tokenizer.json`, or")
def vocabulary(folder):
    (make_clip(folder / "m") / "tokenizer.json").unlink()
    is_refused(folder / "m", "tokenizer.json")
    loads(oldest_clip(folder / "clip"))
    for name, make in (("chinese", older_chinese_clip), ("alt", older_altclip)):
        (make(folder / name) / "tokenizer.json").unlink()
        loads(folder / name)


@line("`open_clip_config.json` with")
def open_clip_config(folder):
    make_open_clip(folder / "m")
    change_json(folder / "m" / "open_clip_config.json", preprocess_cfg={"mean": [0.5] * 3})
    is_refused(f"open_clip:{folder / 'm'}", "open_clip_config.json", "std")
    (folder / "m" / "open_clip_config.json").unlink()
    is_refused(f"open_clip:{folder / 'm'}", "open_clip_config.json")


@line("`open_clip_model.safetensors`")
def open_clip_weights(folder):
    (make_open_clip(folder / "m") / "open_clip_model.safetensors").unlink()
    is_refused(f"open_clip:{folder / 'm'}", "open_clip_model.safetensors")


@line("`tokenizer.json` and `tokenizer_config.json`, where")
def open_clip_tokenizer(folder):
    loads(f"open_clip:{make_open_clip(folder / 'own')}")
    loads(f"open_clip:{open_clip_with_tokenizer(folder / 'm')}")
    (folder / "m" / "tokenizer.json").unlink()
    is_refused(f"open_clip:{folder / 'm'}", "tokenizer.json")


def save_weights(folder: Path, change: Callable[[dict], object]) -> Path:
    held = load_file(make_clip(folder / "m") / "model.safetensors")
    change(held)
    save_file(held, folder / "m" / "model.safetensors", metadata={"format": "pt"})
    return folder / "m"


@line("weights that lack only")
def no_scale(folder):
    loads(save_weights(folder, lambda held: held.pop("logit_scale")))


@line("embeddings for more tokens")
def padded(folder):
    name = "text_model.embeddings.token_embedding.weight"
    save_weights(
        folder, lambda held: held.update({name: torch.cat([held[name], torch.zeros(30, held[name].shape[1])])})
    )
    change_text_config(folder / "m", vocab_size=514 + 30)
    loads(folder / "m")


@line("other files beside these")
def other_files(folder):
    for name in ("README.md", "flax_model.msgpack", "training_args.bin", "tf_model.h5"):
        (make_clip(folder / "m") / name).write_bytes(b"anything")
    loads(folder / "m")


@line("a folder `models--OWNER--NAME/snapshots/REVISION`")
def snapshot(folder):
    loads(make_clip(folder / "models--owner--name" / "snapshots" / "0123"))


@line("a weight that is missing, or")
def no_weight(folder):
    is_refused(
        save_weights(folder / "a", lambda held: held.pop("visual_projection.weight")), "visual_projection.weight"
    )
    name = "text_projection.weight"
    is_refused(save_weights(folder / "b", lambda held: held.update({name: held[name][:-1].clone()})), name)


@line("a preprocessor that makes images of another size")
def image_size(folder):
    settings = json.loads((make_clip(folder / "m") / "processor_config.json").read_bytes())["image_processor"]
    settings |= {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    change_json(folder / "m" / "processor_config.json", image_processor=settings)
    is_refused(folder / "m", "48", "32")


@line("a tokenizer with ids that")
def large_ids(folder):
    tokenizer = json.loads((make_clip(folder / "m") / "tokenizer.json").read_bytes())
    tokenizer["model"]["vocab"]["dog</w>"] = 999
    (folder / "m" / "tokenizer.json").write_text(json.dumps(tokenizer))
    is_refused(folder / "m", "999", "514")


@line("a tokenizer that knows only a part")
def few_letters(folder):
    tokenizer = json.loads((make_clip(folder / "m") / "tokenizer.json").read_bytes())
    del tokenizer["model"]["vocab"]["e"]
    (folder / "m" / "tokenizer.json").write_text(json.dumps(tokenizer))
    is_refused(folder / "m", "unknown")


@line("a tokenizer that ends captions with another token")
def other_end(folder):
    make_clip(folder / "m")
    change_text_config(folder / "m", eos_token_id=7)
    is_refused(folder / "m", "token 513", "looks for 7")


@line("a setting that can't be")
def odd_setting(folder):
    settings = json.loads((make_clip(folder / "m") / "processor_config.json").read_bytes())["image_processor"]
    change_json(folder / "m" / "processor_config.json", image_processor={**settings, "image_mean": [0.5, 0.5]})
    is_refused(folder / "m", "mean", "three numbers")


@line("pickled weights")
def pickled(folder):
    (make_clip(folder / "m") / "model.safetensors").rename(folder / "m" / "pytorch_model.bin")
    is_refused(folder / "m", "pytorch_model.bin", "save_pretrained")


@line("an `adapter_config.json`")
def adapter(folder):
    (make_clip(folder / "m") / "adapter_config.json").write_text("{}")
    is_refused(folder / "m", "merge")


@line("a `modules.json`")
def sentence_transformers(folder):
    make_clip(folder / "m" / "0_CLIPModel")
    (folder / "m" / "modules.json").write_text('[{"path": "0_CLIPModel"}]')
    is_refused(folder / "m", "sentence-transformers", str(folder / "m" / "0_CLIPModel"))


@line("`hf-hub:OWNER/NAME`")
def hub_prefix(_):
    is_refused("hf-hub:OWNER/NAME", "open_clip:OWNER/NAME")


@line("`https://huggingface.co/OWNER/NAME`")
def address(_):
    is_refused("https://huggingface.co/OWNER/NAME", "'OWNER/NAME'")


@line("`ViT-B/32`")
def architecture(_):
    for name in ("ViT-B/32", "open_clip:ViT-B-32"):
        is_refused(name, "architecture", "openai/clip-vit-base-patch32")


@line("a file (`ViT-B-32.pt`)")
def weights_file(folder):
    (folder / "ViT-B-32.pt").touch()
    is_refused(folder / "ViT-B-32.pt", "A model is a folder or a hub id")


@line("`models--OWNER--NAME` in the hub cache")
def hub_cache(folder):
    make_clip(folder / "models--OWNER--NAME" / "snapshots" / "0123")
    is_refused(folder / "models--OWNER--NAME", "'OWNER/NAME'", "snapshots/0123")


def test_every_line_has_a_check():
    first_cells = [cells[0] for cells in lines_of("Model folders")]
    assert len(first_cells) == len(CHECKS) > 20
    for cell in first_cells:
        assert sum(cell.startswith(start) for start in CHECKS) >= 1, cell


@pytest.mark.parametrize("start", CHECKS)
def test_the_line_is_true(start, tmp_path):
    CHECKS[start](tmp_path)


def test_a_checkpoint_without_a_tokenizer_config_loads_with_the_one_that_the_page_gives(tmp_path):
    page = next(
        page for page in Path(__file__).parents[2].glob("docs/inputs*.md") if "BertTokenizer" in page.read_text()
    )
    content = page.read_text().partition("for a ChineseCLIP,\n`")[2].partition("`")[0]
    folder = older_chinese_clip(tmp_path / "m")
    expected = ClipScorer(folder, device="cpu").preprocess.tokenize(["A red 狗, " * 30])
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(content)
    found = ClipScorer(folder, device="cpu").preprocess.tokenize(["A red 狗, " * 30])
    assert torch.equal(found.input_ids, expected.input_ids)
    shutil.rmtree(folder)
