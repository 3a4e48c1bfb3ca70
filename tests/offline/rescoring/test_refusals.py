"""What ``rescore`` and ``dedup`` refuse: outputs of something else, tables and embeddings that do not go together."""

import shutil
import sys

import numpy as np
import pytest

from clipfilter_wds.offline.rescoring.config import DedupConfig, RescoreConfig
from clipfilter_wds.offline.rescoring.run import rescore_shards
from clipfilter_wds.scores.folder import ScoreFolder
from tests.offline.rescoring.conftest import NAMES, NEG, files, tables
from tests.support.embeddings import pair_embeddings, write_scored
from tests.support.score_tables import FINGERPRINT


def test_a_search_in_clusters_without_faiss_says_what_to_install(scored, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"clipfilter-wds\[dedup\]"):
        rescore_shards(DedupConfig(scores=scored, output=tmp_path, search="clustered"))


def test_an_output_of_other_settings_is_refused(scored, derived):
    with pytest.raises(ValueError, match=r"other settings \(derived.seed 0 there, 1 here; .{,120}\); choose"):
        rescore_shards(RescoreConfig(scores=scored, output=derived, **NEG, seed=1))


def test_a_damaged_table_of_the_output_is_refused_with_the_cure(scored, derived, tmp_path):
    output = shutil.copytree(derived, tmp_path / "out")
    whole = (output / "00001.parquet").read_bytes()
    for damaged in (b"", whole[:-10], b"PAR1"):
        (output / "00001.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"00001.parquet' is not a score table .* damaged one, delete it, and"):
            rescore_shards(RescoreConfig(scores=scored, output=output, **NEG))
    (output / "00001.parquet").unlink()
    assert rescore_shards(RescoreConfig(scores=scored, output=output, **NEG)).resumed == 3
    assert files(output) == files(derived)


def test_an_output_with_tables_of_shards_that_are_gone_is_refused_with_the_cure(scored, derived, tmp_path):
    """Whoever reads the folder would take them, and its summary would not count them."""
    fewer, others = (shutil.copytree(folder, tmp_path / folder.name) for folder in (scored, derived))
    config = RescoreConfig(scores=[fewer, others], output=tmp_path / "out", method="sum")
    assert rescore_shards(config).done == 4
    for folder in (fewer, others):
        (folder / "a" / "00003.parquet").unlink()
    with pytest.raises(ValueError, match=r"none of: '.*/out/a/00003.parquet'; delete them, or choose another"):
        rescore_shards(config)
    for folder in (fewer, others):
        (folder / "a" / "00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"a/00002.parquet' and 1 more; delete"):
        rescore_shards(config)
    for name in ("00002", "00003"):
        (tmp_path / "out" / "a" / f"{name}.parquet").unlink()
    assert rescore_shards(config).resumed == len(ScoreFolder(tmp_path / "out").paths) == 2


def test_tables_of_another_method_are_not_mixed_up(scored, derived):
    assert ScoreFolder(derived).fingerprint["score"] == "neg_clip_loss"
    kind = ScoreFolder(derived).kind
    assert (kind.low, kind.high) == (None, 0.0)
    with pytest.raises(ValueError, match="lies in"):
        kind.check_threshold(0.25)
    assert all(table.metadata.embeddings is None for table in tables(derived).values())


def test_tables_without_embeddings_are_refused_with_the_cure(derived, tmp_path):
    with pytest.raises(ValueError, match="--embeddings fp16"):
        rescore_shards(DedupConfig(scores=derived, output=tmp_path))


def test_a_checkpoint_without_a_temperature_needs_one(scored, tmp_path):
    pairs = {"0": pair_embeddings(np.random.default_rng(0), 10, 8)}
    folder = write_scored(tmp_path / "scored", pairs, temperature=None)
    with pytest.raises(ValueError, match="give --temperature"):
        rescore_shards(RescoreConfig(scores=folder, output=tmp_path / "out", method="neg_clip_loss"))
    config = RescoreConfig(scores=folder, output=tmp_path / "out", method="neg_clip_loss", temperature=0.01)
    assert rescore_shards(config).counts.kept == 9


def test_folders_of_other_shards_are_refused(scored, tmp_path):
    rng = np.random.default_rng(0)
    fewer = write_scored(tmp_path / "fewer", {"00000": pair_embeddings(rng, 40, 16)})
    config = RescoreConfig(scores=[scored, fewer], output=tmp_path / "out", method="sum")
    with pytest.raises(ValueError, match="has no table of '00001' and 2 more"):
        rescore_shards(config)
    other = write_scored(tmp_path / "other", {name: pair_embeddings(rng, 39, 16) for name in NAMES})
    config = RescoreConfig(scores=[scored, other], output=tmp_path / "out", method="sum")
    with pytest.raises(ValueError, match="different shards"):
        rescore_shards(config)


@pytest.mark.parametrize("method", ["norm_sim_2", "norm_sim_inf"])
@pytest.mark.parametrize("options", [{"bad_every": 1}, {"bad_every": 0}], ids=str)
def test_a_target_of_no_image_is_refused(scored, tmp_path, method, options):
    pairs = {"0": pair_embeddings(np.random.default_rng(0), 5 if options["bad_every"] else 0, 16)}
    target = write_scored(tmp_path / "target", pairs, **options)
    config = RescoreConfig(scores=scored, output=tmp_path / "out", method=method, target=target)
    with pytest.raises(ValueError, match=r"no image of the target '.*target' could be scored"):
        rescore_shards(config)


def test_embeddings_of_another_model_are_refused(scored, derived, tmp_path):
    rng = np.random.default_rng(0)
    pairs = {name: pair_embeddings(rng, 40 + number, 16) for number, name in enumerate(NAMES)}
    other = write_scored(tmp_path / "other", pairs, fingerprint={"model": "n", "weights": "1" * 64})
    config = RescoreConfig(scores=derived, embeddings=other, output=tmp_path / "out", **NEG)
    with pytest.raises(ValueError, match="the embeddings are of another model, 'n'; score with 'm' and --embeddings"):
        rescore_shards(config)


def test_embeddings_of_several_types_are_refused_and_of_several_places_of_a_model_are_not(scored, tmp_path):
    """A model that has moved has another name, and the weights that it had."""
    shutil.copytree(scored, tmp_path / "scored")
    pairs = {"00001": pair_embeddings(np.random.default_rng(0), 41, 16)}
    write_scored(tmp_path / "scored", pairs, fingerprint={**FINGERPRINT, "model": "/moved/m"})
    rescore_shards(RescoreConfig(scores=tmp_path / "scored", output=tmp_path / "out", **NEG))
    halves = {"00001": pair_embeddings(np.random.default_rng(0), 41, 16, dtype=np.float16)}
    write_scored(tmp_path / "scored", halves)
    with pytest.raises(ValueError, match=r"00001.parquet' goes with embeddings of another type, .*float16.*float32"):
        rescore_shards(RescoreConfig(scores=tmp_path / "scored", output=tmp_path / "out2", **NEG))


def test_what_the_model_is_called_changes_no_fingerprint(scored, tmp_path):
    """Else tables that were derived where the model lies elsewhere could not be combined."""
    for name in ("here", "there"):
        pairs = {"0": pair_embeddings(np.random.default_rng(0), 10, 16)}
        folder = write_scored(tmp_path / name, pairs, fingerprint={**FINGERPRINT, "model": f"/{name}/m"})
        rescore_shards(RescoreConfig(scores=folder, output=tmp_path / f"neg-{name}", method="neg_clip_loss"))
    here, there = (ScoreFolder(tmp_path / f"neg-{name}").fingerprint for name in ("here", "there"))
    assert here["derived"] == there["derived"]


def test_a_target_of_another_model_is_refused(scored, tmp_path):
    pairs = {"0": pair_embeddings(np.random.default_rng(0), 10, 16)}
    target = write_scored(tmp_path / "target", pairs, fingerprint={"model": "n", "weights": "1" * 64})
    config = RescoreConfig(scores=scored, output=tmp_path / "out", method="norm_sim_2", target=target)
    with pytest.raises(ValueError, match="another model"):
        rescore_shards(config)
