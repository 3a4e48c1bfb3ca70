import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clipfilter_wds.models.releases import embeddings_in


def test_embeddings_are_found_in_what_older_and_newer_models_give():
    embeddings = torch.randn(3, 4)
    assert embeddings_in(embeddings) is embeddings
    assert embeddings_in(BaseModelOutputWithPooling(pooler_output=embeddings)) is embeddings
