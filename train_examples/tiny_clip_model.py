"""What the bundled tiny CLIP is: its tokenizer, its image processor, its two towers."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

IMAGE_SIZE = 64
NUM_TOKENS = 32
PROJECTION = 64
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(captions: list[str], num_merges: int = 320) -> CLIPTokenizer:
    """Return a CLIP tokenizer whose merges are learned from the captions.

    Its vocabulary starts with every byte, inside a word and at its end, as OpenAI's does. So no text yields an unknown
    token, which CLIP writes as the end-of-text token, where the text tower would stop reading.
    """
    clip = CLIPTokenizer()  # for its normaliser and pre-tokeniser
    suffix = "</w>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    learner.normalizer = clip.backend_tokenizer.normalizer
    learner.pre_tokenizer = clip.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=num_merges + 2 * len(alphabet),
        initial_alphabet=alphabet,
        # Equally frequent merges are ordered by token id, and ids not fixed here follow a hash of each run's own.
        special_tokens=[letter + suffix for letter in alphabet],
        end_of_word_suffix=suffix,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = [*alphabet, *(letter + suffix for letter in alphabet), *("".join(pair) for pair in merges), BOS, EOS]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=NUM_TOKENS)


def build_processor(captions: list[str]) -> CLIPProcessor:
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return CLIPProcessor(image_processor=image_processor, tokenizer=build_tokenizer(captions))


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3}
    shared = {"projection_dim": PROJECTION}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=PROJECTION,
        vision_config=vision | shared | {"image_size": IMAGE_SIZE, "patch_size": 8},
        text_config=text | shared | special | {"vocab_size": len(tokenizer), "max_position_embeddings": NUM_TOKENS},
    )
    return CLIPModel(config)
