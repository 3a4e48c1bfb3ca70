import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clipfilter_wds.models.releases import embeddings_in, gives_tuple


class _OlderLayer(nn.Module):
    def forward(self, hidden_states, attention_mask=None, output_attentions=False):
        return (hidden_states,)


class _NewerLayer(nn.Module):
    def forward(self, hidden_states, attention_mask=None, **options):
        return hidden_states


def test_embeddings_are_found_in_what_older_and_newer_models_give():
    embeddings = torch.randn(3, 4)
    assert embeddings_in(embeddings) is embeddings
    assert embeddings_in(BaseModelOutputWithPooling(pooler_output=embeddings)) is embeddings


@pytest.mark.parametrize("kind", [_OlderLayer, _NewerLayer])
def test_a_layer_gives_what_it_is_said_to(kind):
    assert gives_tuple(kind()) == isinstance(kind()(torch.zeros(1)), tuple)


def test_a_layer_of_the_installed_release_gives_what_it_is_said_to():
    config = CLIPConfig(vision_config={"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1})
    tower = CLIPVisionModel(config.vision_config)
    [layer] = [module for module in tower.modules() if type(module).__name__ == "CLIPEncoderLayer"]
    masks = [None] * (2 if gives_tuple(layer) else 1)
    assert gives_tuple(layer) == isinstance(layer(torch.zeros(1, 5, 8), *masks), tuple)
