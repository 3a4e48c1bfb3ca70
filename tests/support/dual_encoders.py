"""Makes small, random dual encoders of other families, saved as their libraries save them, and their plain loops."""

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory

import sentencepiece
import torch
import transformers
from PIL import Image
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    AltCLIPProcessor,
    AutoModel,
    AutoProcessor,
    BertTokenizerFast,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPImageProcessor,
    CLIPProcessor,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedModel,
    ProcessorMixin,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    SiglipTokenizer,
    XLMRobertaTokenizerFast,
)

from tests.support.image_processors import as_seen
from tests.support.toys import Reference

_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
_VISION = {**_TOWER, "image_size": 32, "patch_size": 16}
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?中文图片红色的狗صورةقط"


def make_chinese_clip(folder: Path) -> Path:
    """Squares images, as the published checkpoints do, and hides padding by a mask."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_LETTERS, *("##" + letter for letter in _LETTERS)]
    with TemporaryDirectory() as files:
        Path(files, "vocab.txt").write_text("\n".join([*pieces, ""]))
        tokenizer = BertTokenizerFast.from_pretrained(files, model_max_length=52)
    config = ChineseCLIPConfig(
        text_config={**_TOWER, "vocab_size": len(pieces), "max_position_embeddings": 64, "initializer_range": 0.3},
        vision_config=_VISION,
        projection_dim=24,
    )
    images = ChineseCLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    return _save(folder, ChineseCLIPModel(config), ChineseCLIPProcessor(images, tokenizer))


def make_altclip(folder: Path) -> Path:
    """Crops images, and hides padding by a mask; two of the positions are not for tokens."""
    tokenizer = _xlm_roberta()
    config = AltCLIPConfig(
        text_config={**_TOWER, "vocab_size": len(tokenizer) + 8, "max_position_embeddings": 42, "project_dim": 24},
        vision_config={**_VISION, "projection_dim": 24},
        projection_dim=24,
    )
    config.text_config.initializer_range = 0.3
    tokenizer.model_max_length = 40
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return _save(folder, AltCLIPModel(config), AltCLIPProcessor(images, tokenizer))


def make_metaclip2(folder: Path) -> Path:
    """As CLIP, with the tokenizer of XLM-RoBERTa."""
    tokenizer = _xlm_roberta(model_max_length=24)
    config = MetaClip2Config(
        text_config={**_TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "eos_token_id": 2},
        vision_config=_VISION,
        projection_dim=24,
    )
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return _save(folder, MetaClip2Model(config), CLIPProcessor(images, tokenizer))


def _xlm_roberta(**options: int) -> XLMRobertaTokenizerFast:
    with TemporaryDirectory() as files:
        train_sentencepiece(Path(files, "sentencepiece.bpe.model"), vocab_size=100)
        return XLMRobertaTokenizerFast.from_pretrained(files, **options)


def make_siglip(folder: Path) -> Path:
    """Squares images to another size, and pads all captions to 16 tokens, which the text tower sees."""
    folder.mkdir()
    vocabulary = train_sentencepiece(folder / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    # Published tokenizers give no attention mask, and the towers were trained without one.
    tokenizer = SiglipTokenizer(str(vocabulary), model_max_length=16, model_input_names=["input_ids"])
    return _save_siglip(folder, tokenizer, len(tokenizer), pad_id=tokenizer.pad_token_id)


def train_sentencepiece(path: Path, *, vocab_size: int = 110, **options: int) -> Path:
    """A vocabulary of letters."""
    sentences = [" ".join(_LETTERS[start:] + _LETTERS[:start]) for start in range(len(_LETTERS))]
    with path.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, vocab_size=vocab_size, hard_vocab_limit=False,
            minloglevel=2, **options,
        )  # fmt: skip
    return path


def make_siglip2(folder: Path) -> Path:
    """As SigLIP, with the tokenizer of Gemma."""
    from transformers import GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *_LETTERS]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = GemmaTokenizer(
        vocab=vocab, merges=[], add_bos_token=False, add_eos_token=True, padding_side="right", model_max_length=16,
        model_input_names=["input_ids"],
    )  # fmt: skip
    return _save_siglip(folder, tokenizer, len(pieces), pad_id=0)


def _save_siglip(folder: Path, tokenizer: object, num_tokens: int, pad_id: int) -> Path:
    config = SiglipConfig(
        text_config={**_TOWER, "vocab_size": num_tokens, "max_position_embeddings": 16, "pad_token_id": pad_id},
        vision_config={**_VISION, "image_size": 48},
    )
    images = SiglipImageProcessor(size={"height": 48, "width": 48})
    return _save(folder, SiglipModel(config), SiglipProcessor(images, tokenizer))


def _save(folder: Path, model: PreTrainedModel, processor: ProcessorMixin) -> Path:
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():  # larger than usual, so that the scores of a random model spread
        if weight.ndim > 1:
            weight.data = torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_open_clip(
    folder: Path, *, resize_mode: str = "shortest", quick_gelu: bool = False, averaged: bool = False
) -> Path:
    """As open_clip's ``push_to_hf_hub`` writes them: a config of its own, and open_clip_model.safetensors.

    With ``averaged``, patches are averaged, and tokens see those behind them, as in CLIPA. Captions are projected
    with a bias, as in SigLIP.
    """
    import open_clip
    from safetensors.torch import save_file

    tower = {"width": 64, "heads": 4, "layers": 2}
    config = {
        "embed_dim": 24,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2},
        "text_cfg": {**tower, "context_length": 20, "vocab_size": 49408},
    }
    if averaged:
        config["vision_cfg"] |= {"pool_type": "avg", "no_ln_pre": True}
        config["text_cfg"] |= {"pool_type": "last", "no_causal_mask": True, "proj_bias": True}
    images = {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "resize_mode": resize_mode}
    folder.mkdir()
    text = json.dumps({"model_cfg": config, "preprocess_cfg": images})
    (folder / "open_clip_config.json").write_text(text)
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data *= 3 if "embedding" in name else 1.5
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


class HuggingFaceReference:
    """The plain loop of transformers: ``AutoProcessor`` and ``AutoModel`` in float32, one pair at a time."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModel.from_pretrained(folder).float().eval()
        self._processor = AutoProcessor.from_pretrained(folder)
        self._padding = "max_length" if self._model.config.model_type == "siglip" else True

    @torch.inference_mode()
    def score(self, image: Image.Image, caption: str) -> float:
        """Raw cosine of one pair."""
        inputs = self._processor(
            text=[caption],
            images=as_seen(image.convert("RGB")),
            return_tensors="pt",
            padding=self._padding,
            truncation=True,
        )
        output = self._model(**inputs)
        return (output.image_embeds * output.text_embeds).sum().item()


class OpenClipReference:
    """The plain loop of open_clip, in float32, one pair at a time."""

    def __init__(self, folder: Path) -> None:
        import open_clip

        where = f"local-dir:{folder}"
        self._model, self._preprocess = open_clip.create_model_from_pretrained(where)
        self._tokenizer = open_clip.get_tokenizer(where)
        self._model.eval()

    @torch.inference_mode()
    def score(self, image: Image.Image, caption: str) -> float:
        """Raw cosine of one pair."""
        images = self._model.encode_image(self._preprocess(image)[None], normalize=True)
        texts = self._model.encode_text(self._tokenizer([caption]), normalize=True)
        return (images * texts).sum().item()


#: Per family, how to save a model, the plain loop, and how it is called: a prefix before the folder.
FAMILIES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Reference], str]] = {
    "chinese_clip": (make_chinese_clip, HuggingFaceReference, ""),
    "altclip": (make_altclip, HuggingFaceReference, ""),
    "metaclip_2": (make_metaclip2, HuggingFaceReference, ""),
    "siglip": (make_siglip, HuggingFaceReference, ""),
    "open_clip": (make_open_clip, OpenClipReference, "open_clip:"),
    "open_clip, squashed": (
        lambda folder: make_open_clip(folder, resize_mode="squash", quick_gelu=True), OpenClipReference, "open_clip:",
    ),
    "open_clip, averaged": (
        lambda folder: make_open_clip(folder, averaged=True), OpenClipReference, "open_clip:",
    ),
}  # fmt: skip
if "vocab" in signature(transformers.GemmaTokenizer).parameters:  # older ones are made of sentencepiece's files alone
    FAMILIES["siglip2"] = (make_siglip2, HuggingFaceReference, "")
