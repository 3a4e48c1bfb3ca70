import torch

from clipfilter_wds.models.precision import NARROW, resolve_precision
from clipfilter_wds.models.scorer import ClipScorer
from tests.support.toys import make_clip

CPU = torch.device("cpu")


def test_the_last_projections_stay_in_float32(tmp_path):
    scorer = ClipScorer(make_clip(tmp_path, image_size=64, patch_size=16, width=NARROW), device="cpu", precision="bf16")
    types = {name: weight.dtype for name, weight in scorer.fast.towers.named_parameters() if name.endswith("weight")}
    projections = {name: dtype for name, dtype in types.items() if "_projection." in name}
    assert projections == {
        "model.visual_projection.weight": torch.float32,
        "model.text_projection.weight": torch.float32,
    }
    assert all(dtype == torch.bfloat16 for name, dtype in types.items() if "proj.weight" in name or ".fc" in name)
    assert all(weight.dtype == torch.float32 for weight in scorer.exact.towers.parameters())


def test_auto_is_float32_for_narrow_models():
    assert resolve_precision("auto", torch.device("cuda"), NARROW) == "fp16"
    assert resolve_precision("auto", torch.device("cuda"), NARROW - 1) == "fp32"
    assert resolve_precision("auto", CPU, NARROW - 1) == "fp32"
