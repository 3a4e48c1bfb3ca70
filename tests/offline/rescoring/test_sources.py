"""Tables and embeddings that are not of the same samples are not used together."""

import numpy as np
import pyarrow as pa
import pytest

from clipfilter_wds.offline.rescoring.config import DedupConfig, RescoreConfig
from clipfilter_wds.offline.rescoring.run import rescore_shards
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.table import ShardScores
from tests.support.embeddings import pair_embeddings, write_scored
from tests.support.score_tables import FINGERPRINT, written

TRIAL = {**FINGERPRINT, "limit": 15}
METHODS = ["neg_clip_loss", "norm_sim_2", "dedup"]
COMBINATIONS = [{"method": "sum"}, {"method": "min_rank"}, {"method": "then", "fractions": [0.5, 0.3]}]


def scored(folder, **changes):
    """Two shards, always the same samples."""
    rng = np.random.default_rng(0)
    return write_scored(folder, {name: pair_embeddings(rng, 10, 8) for name in ("0", "a/1")}, **changes)


def rekeyed(folder):
    """The last table's keys begin with an x."""
    path = folder / "a" / "1.parquet"
    found = ShardScores.read(path)
    keys = pa.array([f"x{key}" for key in found.keys])
    table = found.table.set_column(0, found.table.schema.field(0), keys)
    path.write_bytes(written(ShardScores(table=table, metadata=found.metadata)))
    return folder


def by_embeddings(method, scores, embeddings, output):
    """Make new tables with the embeddings of another folder."""
    options = {"scores": scores, "embeddings": embeddings, "output": output, "device": "cpu"}
    if method == "dedup":
        return rescore_shards(DedupConfig(**options))
    target = {"target": embeddings} if method == "norm_sim_2" else {}
    return rescore_shards(RescoreConfig(**options, **target, method=method))


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_of_shards_with_other_members_are_refused(tmp_path, method):
    here, there = (scored(tmp_path / name, signature=name) for name in ("here", "there"))
    with pytest.raises(ValueError, match=r"there/0.parquet' and '.*/here/0.parquet' are of different shards: the memb"):
        by_embeddings(method, here, there, tmp_path / "out")
    assert not [*(tmp_path / "out").rglob("*.parquet")]


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_of_other_keys_are_refused(tmp_path, method):
    here, there = scored(tmp_path / "here"), rekeyed(scored(tmp_path / "there"))
    with pytest.raises(ValueError, match=r"there/a/1.parquet' holds other samples than '.*/here/a/1.parquet': key 'xa"):
        by_embeddings(method, here, there, tmp_path / "out")


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_of_the_same_shards_are_taken_also_where_older_tables_know_no_signature(tmp_path, method):
    here, there = scored(tmp_path / "here", signature="s", storage_version="1"), scored(tmp_path / "there")
    assert by_embeddings(method, here, there, tmp_path / "out").done == 2


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: options["method"])
def test_scores_of_shards_with_other_members_or_keys_are_not_combined(tmp_path, options):
    here = scored(tmp_path / "here", signature="here")
    for there in (scored(tmp_path / "there", signature="there"), rekeyed(scored(tmp_path / "rekeyed"))):
        with pytest.raises(ValueError, match=r"different shards|other samples"):
            rescore_shards(RescoreConfig(scores=[here, there], output=tmp_path / f"out-{there.name}", **options))


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: options["method"])
@pytest.mark.parametrize("order", [("full", "trial"), ("trial", "full")])
def test_a_trial_is_not_combined_with_all_samples(tmp_path, options, order):
    scored(tmp_path / "full")
    scored(tmp_path / "trial", fingerprint=TRIAL)
    extents = {"full": "all samples", "trial": r"the first 15 samples alone \(--limit\)"}
    first, second = order
    says = rf"/{second}' has scores of {extents[second]}, and '.*/{first}' of {extents[first]}; score both without"
    with pytest.raises(ValueError, match=says):
        rescore_shards(RescoreConfig(scores=[tmp_path / name for name in order], output=tmp_path / "out", **options))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("limit", [None, 8])
def test_embeddings_of_a_trial_are_refused_for_other_samples(tmp_path, method, limit):
    here = scored(tmp_path / "here", fingerprint=FINGERPRINT if limit is None else {**FINGERPRINT, "limit": limit})
    trial = scored(tmp_path / "trial", fingerprint=TRIAL)
    with pytest.raises(ValueError, match="trial' has scores of the first 15 samples alone"):
        by_embeddings(method, here, trial, tmp_path / "out")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("embeddings", [TRIAL, FINGERPRINT], ids=["its own", "of all samples"])
def test_what_is_made_of_a_trial_is_one(tmp_path, method, embeddings):
    trial = scored(tmp_path / "trial", fingerprint=TRIAL)
    there = scored(tmp_path / "there", fingerprint=embeddings)
    by_embeddings(method, trial, there, tmp_path / "out")
    with pytest.raises(ValueError, match="are a trial on the first 15 samples"):
        ScoreFolder(tmp_path / "out").refuse_trial()


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: options["method"])
def test_what_is_combined_of_trials_on_the_same_samples_is_one(tmp_path, options):
    trials = [scored(tmp_path / name, fingerprint=TRIAL) for name in ("one", "other")]
    rescore_shards(RescoreConfig(scores=trials, output=tmp_path / "out", **options))
    with pytest.raises(ValueError, match="are a trial"):
        ScoreFolder(tmp_path / "out").refuse_trial()
