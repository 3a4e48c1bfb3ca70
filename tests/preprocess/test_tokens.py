import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import AutoTokenizer

from clipfilter_wds.models.loading import BUNDLED_MODELS
from clipfilter_wds.preprocess import tokens as preprocess_tokens
from clipfilter_wds.preprocess.tokens import NO_CAPTION, CaptionTokenizer, PythonEncoder, RustEncoder


@pytest.fixture(scope="module", params=["demo-tiny", "random"])
def tokenizers(request, clip_folder):
    """The tokenizer of ``transformers``, and ours."""
    reference = AutoTokenizer.from_pretrained(
        BUNDLED_MODELS["demo-tiny"] if request.param == "demo-tiny" else clip_folder
    )
    length = min(77, reference.model_max_length)
    encode = RustEncoder(reference.backend_tokenizer, max_length=length)
    ours = CaptionTokenizer(encode, max_length=length, pad_id=reference.pad_token_id)
    return reference, ours, length


def check_tokens(tokenizers, captions: list[str]) -> None:
    reference, ours, length = tokenizers
    tokens = ours([[caption] for caption in captions])
    options = {"padding": True, "truncation": True, "max_length": length}
    expected = reference(captions, return_tensors="pt", **options).input_ids
    assert tokens.input_ids.dtype == torch.int64
    assert torch.equal(tokens.input_ids, expected)
    num_tokens = [len(reference(caption).input_ids) for caption in captions]
    assert tokens.num_tokens == num_tokens
    assert tokens.truncated == [num > length for num in num_tokens]


CAPTIONS = {
    "plain": "a photo of two red circles",
    "emoji": "📷 of a 🐈‍⬛ and 🇪🇺 👩‍👩‍👧‍👦",
    "right to left": "صورة لقطة على الطاولة \u202eabc\u202c",
    "nul": "a\0b",
    "special tokens": "<|startoftext|>a<|endoftext|> b <|endoftext|>",
    "combining": "e\u0301 ﬁ ① Å ß İ",
    "white space": "  a \t\n\r b\u00a0c\u2003d  ",
    "very long": "word " * 5000,
    "one long word": "x" * 5000,
    "one letter": "x",
    "exotic": "\ufffd\ufeff\u200b\U0010ffff",
}


@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
def test_token_ids_equal_those_of_the_tokenizer(tokenizers, caption):
    check_tokens(tokenizers, [caption])
    check_tokens(tokenizers, ["a", caption, "two words"])


@settings(max_examples=150)
@given(captions=st.lists(st.text(max_size=120), min_size=1, max_size=4))
def test_token_ids_equal_those_of_the_tokenizer_for_any_text(tokenizers, captions):
    check_tokens(tokenizers, captions)


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_caption_is_truncated_only_where_it_is_longer_than_the_text_tower_takes(tokenizers, off):
    _, ours, length = tokenizers
    letters = 0
    while ours([["x " * letters]]).num_tokens[0] < length + off:
        letters += 1
    tokens = ours([["x " * letters]])
    assert tokens.num_tokens == [length + off]
    assert tokens.truncated == [off > 0]
    assert tokens.input_ids.shape == (1, min(length, length + off))


@given(st.text(st.sampled_from("ab \n\u2003é"), max_size=40))
def test_a_long_caption_is_cut_as_if_all_its_white_space_were_single_blanks(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess_tokens, "_MAX_CAPTION_CHARS", 8)
        assert preprocess_tokens.bounded(text) == (text if len(text) <= 8 else " ".join(text.split())[:8])


def test_no_captions_are_no_tokens(tokenizers):
    ids, num_tokens, truncated = tokenizers[1]([])
    assert (ids.shape, ids.dtype, num_tokens, truncated) == ((0, 0), torch.int64, [], [])


def test_padding_does_not_depend_on_batches_before(tokenizers):
    ours = tokenizers[1]
    ours([["long " * 100], ["short"]])
    check_tokens(tokenizers, ["short", "a bit longer"])


@pytest.mark.parametrize(("pads_to_max", "expected"), [(False, [2, 4, 4, 1, 4]), (True, [4] * 5)])
def test_the_text_tower_needs_the_tokens_of_a_caption_and_one_that_may_be_padding(tokenizers, pads_to_max, expected):
    tokenize = CaptionTokenizer(tokenizers[1]._encode, max_length=4, pad_id=9, pads_to_max=pads_to_max)
    ids = torch.tensor([[1, 9, 9, 9], [1, 2, 3, 9], [1, 2, 3, 4], [9, 9, 9, 9], [1, 9, 3, 9]])
    assert tokenize.used_lengths(ids).tolist() == expected
    assert tokenize.used_lengths(torch.empty(0, 0, dtype=torch.int64)).tolist() == []


def test_captions_are_padded_to_the_longest_or_to_the_limit():
    encode = PythonEncoder(lambda caption: [*map(ord, caption), 0], max_length=4, identity=b"")
    for pads_to_max, width in ((False, 3), (True, 4)):
        tokens = CaptionTokenizer(encode, max_length=4, pad_id=9, pads_to_max=pads_to_max)([["ab"], ["c"]])
        assert tokens.input_ids.tolist() == [[97, 98, 0, 9][:width], [99, 0, 9, 9][:width]]
    tokens = CaptionTokenizer(encode, max_length=4, pad_id=9)([["abc"], ["abcd"]])
    assert tokens.input_ids.tolist() == [[97, 98, 99, 0]] * 2
    assert (tokens.num_tokens, tokens.truncated) == ([4, 5], [False, True])


def test_batches_of_different_lengths_are_joined(tokenizers):
    _, ours, _ = tokenizers
    first, second = ours(["a", "two blue squares"]).input_ids, ours(["three small green triangles on white"]).input_ids
    assert torch.equal(
        ours.join([first, second]), ours(["a", "two blue squares", "three small green triangles on white"]).input_ids
    )
    several = ours([["a", "b"], ["c"]]).input_ids
    joined = ours.join([several, second])
    assert joined.shape == (3, 2, second.shape[1])
    assert torch.equal(joined[2, 0], second[0])
    assert (joined[2, 1] == NO_CAPTION).all()
    assert torch.equal(ours.join([several]), several)
