import subprocess
import sys
from dataclasses import asdict

import pytest

from clipfilter_wds.models.config import ScorerConfig
from clipfilter_wds.models.scorer import ClipScorer


def test_it_needs_no_torch():
    code = "import sys, clipfilter_wds.models.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_scorer_takes_its_options(clip_folder):
    config = ScorerConfig(model=clip_folder, device="cpu", precision="bf16", reduce="min", flip=True, fast_decode=True)
    scorer = ClipScorer(**asdict(config))
    assert (scorer.precision, scorer.preprocess.view.fast_decode) == ("bf16", True)
    assert scorer.fingerprint["model"] == str(clip_folder)
    assert (scorer.fingerprint["reduce"], scorer.fingerprint["flip"]) == ("min", True)


def test_an_unknown_option_or_value_is_refused(clip_folder):
    with pytest.raises(TypeError, match="precison"):
        ClipScorer(clip_folder, precison="bf16")
    with pytest.raises(ValueError, match="use auto, fp32, bf16 or fp16"):
        ScorerConfig(precision="int8")
    with pytest.raises(ValueError, match="use max, mean or min"):
        ScorerConfig(reduce="median")
    with pytest.raises(ValueError, match="leave compile out"):
        ClipScorer(clip_folder, device="cpu", precision="fp32", compile=True)


def test_there_are_no_cuda_graphs_on_a_cpu(clip_folder):
    scorer = ClipScorer(clip_folder, device="cpu", precision="bf16", cuda_graphs=True)
    assert not scorer.exact.is_graphed
    assert not scorer.fast.is_graphed
    scorer.warm_up(64)  # does nothing
