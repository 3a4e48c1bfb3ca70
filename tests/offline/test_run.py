import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from clipfilter_wds import console
from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.split import split_by_worker
from tests.support.outputs import THRESHOLD, bits, check_accounting, run
from tests.support.toys import Reference, encoded, pair, photo, tar_members, write_shard, write_tar


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Three good shards with members beyond image and caption."""
    folder = tmp_path_factory.mktemp("in")
    for shard in range(3):
        samples = [{**pair(100 * shard + i), "json": b'{"i": %d}' % i, "npy": bytes([i])} for i in range(30)]
        write_shard(folder / f"{shard:05d}.tar", samples, start=1000 * shard)
    return folder


def test_keeps_what_the_plain_loop_keeps_with_every_member_as_it_was(scorer, clip_folder, shards, tmp_path):
    run(scorer, f"{shards}/{{00000..00002}}.tar", tmp_path / "out")
    reference = Reference(clip_folder)
    num_kept = 0
    for shard in range(3):
        members = tar_members(shards / f"{shard:05d}.tar")
        expected = []
        for image, caption, *others in zip(*[iter(members)] * 4, strict=True):
            score = reference.score(Image.open(io.BytesIO(image[1])), caption[1].decode())
            expected += [image, caption, *others] if min(max(score, 0.0), 1.0) >= THRESHOLD else []
        assert tar_members(tmp_path / "out" / f"{shard:05d}.tar") == expected
        num_kept += len(expected) // 4
    summary = check_accounting(tmp_path / "out")
    assert 0 < num_kept < 90
    assert (summary["kept"], summary["seen"], summary["shards"]) == (num_kept, 90, 3)


@pytest.mark.parametrize("progress", [False, True])
def test_progress_is_shown_where_it_is_asked_for(scorer, shards, tmp_path, capsys, monkeypatch, progress):
    monkeypatch.setattr(console, "_LINE_SECONDS", 0.0)
    told = []
    config = ScoreConfig(shards=shards, output=tmp_path / "out", num_workers=0)
    process_shards(config, scorer, on_progress=lambda tally: told.append(tally.done), progress=progress)
    assert ("3/3 shards" in capsys.readouterr().err) == progress
    assert told[-1] == 3


def test_a_model_is_given_itself_and_not_its_name(shards, tmp_path):
    with pytest.raises(TypeError, match="scorer is 'demo-tiny'; give a ClipScorer of that model"):
        process_shards(ScoreConfig(shards=shards, output=tmp_path / "out"), "demo-tiny")
    assert not (tmp_path / "out").exists()


def test_what_describes_the_output_is_what_other_tools_read(scorer, shards, tmp_path):
    run(scorer, f"{shards}/*.tar", tmp_path / "out")
    sizes = json.loads((tmp_path / "out" / "sizes.json").read_bytes())
    for name, num_samples in sizes.items():
        dataset = webdataset.WebDataset(str(tmp_path / "out" / name), shardshuffle=False)
        assert sum(1 for _ in dataset) == num_samples
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname) for info in tar} == {(0, 0, 0, "")}
    table = ShardScores.read(tmp_path / "out" / "_scores" / "00000.parquet").table
    columns = ["key", "index", "score", "reason", "num_tokens", "truncated", "width", "height", "uid"]
    assert table.column_names == columns


def test_the_same_input_gives_the_same_bits_whatever_the_workers(scorer, shards, tmp_path):
    outputs = [tmp_path / f"out{num_workers}" for num_workers in (0, 1, 3, 8)]
    for output in outputs:
        run(scorer, f"{shards}/*.tar", output, num_workers=int(output.name[3:]))
    assert all(bits(output) == bits(outputs[0]) for output in outputs)


def test_eight_workers_on_three_shards_all_work_and_read_every_sample_once(scorer, shards, tmp_path):
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    assert all(split_by_worker(urls, worker, 8) for worker in range(8))
    run(scorer, urls, tmp_path / "out", num_workers=8, batch_size=4)
    for shard in range(3):
        table = ShardScores.read(tmp_path / "out" / "_scores" / f"{shard:05d}.parquet").table
        assert table["index"].to_pylist() == list(range(30))
        assert table["key"].to_pylist() == [f"{1000 * shard + i:09d}" for i in range(30)]


def bad_samples() -> dict[str, dict[str, bytes]]:
    """One sample per way of being bad, by its reason."""
    good = pair(1)
    return {
        "blank_caption": {**good, "txt": b" \n\t"},
        "missing_caption": {"jpg": good["jpg"]},
        "missing_image": {"txt": good["txt"]},
        "unreadable_image": {**good, "jpg": good["jpg"][:200]},
        "image_too_large": {**good, "png": _bomb(), "jpg": b""} | {"jpg": _bomb()},
    }


def _bomb() -> bytes:
    """A PNG whose header declares 60,000 x 60,000 pixels."""
    data = bytearray(encoded(photo(0), "PNG"))
    import zlib

    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_every_bad_sample_is_counted_by_its_reason_and_costs_nothing_else(scorer, tmp_path):
    samples = [sample for i, bad in enumerate(bad_samples().values()) for sample in (pair(i), bad)] + [pair(9)]
    write_shard(tmp_path / "in/0.tar", samples)
    run(scorer, tmp_path / "in/0.tar", tmp_path / "out", threshold=-1)
    summary = check_accounting(tmp_path / "out")
    assert summary["dropped"] == dict.fromkeys(bad_samples(), 1)
    kept = {name.partition(".")[0] for name, _ in tar_members(tmp_path / "out" / "0.tar")}
    assert kept == {f"{2 * i:09d}" for i in range(6)}


def test_captions_come_from_a_json_field_when_told(scorer, tmp_path):
    samples = [{"jpg": pair(i)["jpg"], "json": json.dumps({"text": f"photo number {i}"}).encode()} for i in range(4)]
    samples += [{"jpg": pair(0)["jpg"], "json": b'{"other": 1}'}, {"jpg": pair(0)["jpg"], "json": b"{"}]
    write_shard(tmp_path / "json/0.tar", samples)
    write_shard(tmp_path / "txt/0.tar", [pair(i) for i in range(4)])
    run(scorer, tmp_path / "json/0.tar", tmp_path / "a", caption="json:text")
    run(scorer, tmp_path / "txt/0.tar", tmp_path / "b")
    from_json, from_txt = (ShardScores.read(tmp_path / name / "_scores/0.parquet") for name in "ab")
    np.testing.assert_allclose(from_json.scores[:4], from_txt.scores, atol=1e-6)
    assert from_json.dropped == {"missing_caption": 2}


def test_a_shard_cut_at_every_block_keeps_only_whole_pairs_and_counts_the_cut_one(scorer, tmp_path):
    samples = [pair(i, size=(8, 8)) for i in range(3)]
    whole = write_shard(tmp_path / "whole.tar", samples).read_bytes()
    original = dict(tar_members(tmp_path / "whole.tar"))
    cuts = range(0, len(whole) + 1, 512)
    for cut in cuts:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{cut:06d}.tar").write_bytes(whole[:cut])
    summary = run(scorer, f"{tmp_path}/in/*.tar", tmp_path / "out", threshold=-1)
    assert summary["failed_shards"] == {}
    assert summary["torn_shards"] > 0
    check_accounting(tmp_path / "out")
    for cut in cuts:
        stats = json.loads((tmp_path / "out" / f"{cut:06d}_stats.json").read_bytes())
        assert stats["dropped"].get("torn", 0) == (1 if stats["torn"] and cut else 0)
        tar = tmp_path / "out" / f"{cut:06d}.tar"
        members = tar_members(tar) if tar.exists() else []
        assert all(original[name] == data for name, data in members)
        assert members == list(original.items())[: 2 * stats["kept"]]
    assert stats["kept"] == 3  # the shard that was not cut
    assert not stats["torn"]


def test_a_bad_shard_fails_alone_and_is_named(scorer, tmp_path):
    write_shard(tmp_path / "in/good.tar", [pair(i) for i in range(5)])
    (tmp_path / "in/garbage.tar").write_bytes(b"<html>404</html>" * 100)
    unsorted = [("a.jpg", pair(0)["jpg"]), ("b.jpg", pair(1)["jpg"]), ("a.txt", b"a"), ("b.txt", b"b")]
    write_tar(tmp_path / "in/unsorted.tar", unsorted)
    write_tar(tmp_path / "in/empty.tar", [])
    run(scorer, f"{tmp_path}/in/*.tar", tmp_path / "out", num_workers=2)
    summary = check_accounting(tmp_path / "out")
    failed = {Path(url).name: why for url, why in summary["failed_shards"].items()}
    assert set(failed) == {"garbage.tar", "unsorted.tar"}
    assert "not a tar archive" in failed["garbage.tar"]
    assert "'a'" in failed["unsorted.tar"]
    assert "side by side" in failed["unsorted.tar"]
    assert summary["seen"] == 5
    assert not list((tmp_path / "out").glob("unsorted*"))


def test_shards_of_one_name_in_different_folders_keep_their_folders(scorer, tmp_path):
    for folder in ("a", "b"):
        write_shard(tmp_path / "in" / folder / "0.tar", [pair(ord(folder))])
    run(scorer, f"{tmp_path}/in/*/0.tar", tmp_path / "out", threshold=-1)
    for folder in ("a", "b"):
        assert tar_members(tmp_path / "out" / folder / "0.tar") == tar_members(tmp_path / "in" / folder / "0.tar")
    assert json.loads((tmp_path / "out/sizes.json").read_bytes()) == {"a/0.tar": 1, "b/0.tar": 1}


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst"])
def test_packed_shards_give_the_same_tar_as_plain_ones(scorer, tmp_path, suffix):
    import gzip

    import zstandard

    plain = write_shard(tmp_path / "plain/0.tar", [pair(i) for i in range(6)])
    pack = gzip.compress if suffix == ".tar.gz" else zstandard.compress
    (tmp_path / f"0{suffix}").write_bytes(pack(plain.read_bytes()))
    run(scorer, plain, tmp_path / "a", threshold=-1)
    run(scorer, tmp_path / f"0{suffix}", tmp_path / "b", threshold=-1)
    assert (tmp_path / "a/0.tar").read_bytes() == (tmp_path / "b/0.tar").read_bytes()


class TestResume:
    def test_a_second_run_does_nothing_again(self, scorer, shards, tmp_path):
        run(scorer, f"{shards}/*.tar", tmp_path / "out")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
        summary = run(scorer, f"{shards}/*.tar", tmp_path / "out")
        assert (summary["resumed_shards"], summary["scored"], summary["seen"]) == (3, 0, 90)
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")} == before
        check_accounting(tmp_path / "out")

    @pytest.mark.parametrize("lost", ["00001_stats.json", "00001.tar"])
    def test_a_shard_whose_mark_or_tar_is_gone_is_done_again(self, scorer, shards, tmp_path, lost):
        run(scorer, f"{shards}/*.tar", tmp_path / "out")
        before = bits(tmp_path / "out")
        (tmp_path / "out" / lost).unlink()
        assert run(scorer, f"{shards}/*.tar", tmp_path / "out")["resumed_shards"] == 2
        assert bits(tmp_path / "out") == before

    def test_a_shard_that_changed_since_is_done_again(self, scorer, tmp_path):
        shard = write_shard(tmp_path / "in/0.tar", [pair(i) for i in range(4)])
        run(scorer, shard, tmp_path / "out", threshold=-1)
        write_shard(shard, [pair(i, size=(99, 99)) for i in range(40)])
        assert run(scorer, shard, tmp_path / "out", threshold=-1)["kept"] == 40

    def test_another_threshold_is_refused_with_both_values(self, scorer, shards, tmp_path):
        run(scorer, f"{shards}/*.tar", tmp_path / "out")
        with pytest.raises(ValueError, match=r"threshold 0\.12 there, 0\.3 here"):
            run(scorer, f"{shards}/*.tar", tmp_path / "out", threshold=0.3)

    def test_a_shard_of_the_same_name_from_elsewhere_overwrites_nothing(self, scorer, shards, tmp_path):
        run(scorer, f"{shards}/00000.tar", tmp_path / "out")
        before = bits(tmp_path / "out")
        other = write_shard(tmp_path / "in/00000.tar", [pair(77)])
        with pytest.raises(ValueError, match="was made from"):
            run(scorer, other, tmp_path / "out")
        assert bits(tmp_path / "out") == before

    def test_more_shards_may_join_an_output(self, scorer, shards, tmp_path):
        run(scorer, f"{shards}/00000.tar", tmp_path / "out")
        run(scorer, f"{shards}/00001.tar,{shards}/00002.tar", tmp_path / "out")
        run(scorer, f"{shards}/*.tar", tmp_path / "at once")
        assert bits(tmp_path / "out") == bits(tmp_path / "at once")


class TestScore:
    def test_tables_equal_those_of_a_rewrite(self, scorer, shards, tmp_path):
        tally = process_shards(ScoreConfig(shards=f"{shards}/*.tar", output=tmp_path / "s", batch_size=8), scorer)
        run(scorer, f"{shards}/*.tar", tmp_path / "out")
        assert bits(tmp_path / "s") == bits(tmp_path / "out" / "_scores")
        assert tally.counts.seen == tally.counts.kept == 90
        summary = json.loads((tmp_path / "s" / "summary.json").read_bytes())
        assert summary["seen"] == summary["kept"] + sum(summary["dropped"].values()) == 90

    def test_is_resumed(self, scorer, shards, tmp_path):
        config = ScoreConfig(shards=f"{shards}/*.tar", output=tmp_path, batch_size=8, num_workers=0)
        process_shards(config, scorer)
        (tmp_path / "00001.parquet").unlink()
        tally = process_shards(config, scorer)
        assert (tally.resumed, tally.num_scored) == (2, 30)


def test_random_damage_never_mixes_or_loses_a_sample(scorer, tmp_path):
    rng = random.Random(0)
    whole = write_shard(tmp_path / "whole.tar", [pair(i, size=(8, 8)) for i in range(8)]).read_bytes()
    original = dict(tar_members(tmp_path / "whole.tar"))
    (tmp_path / "in").mkdir()
    for number in range(60):
        data = bytearray(whole)
        start = rng.randrange(len(whole))
        for position in range(start, min(start + rng.choice([1, 4, 700]), len(whole))):
            data[position] ^= 1 << rng.randrange(8)
        (tmp_path / "in" / f"{number}.tar").write_bytes(data)
    run(scorer, f"{tmp_path}/in/*.tar", tmp_path / "out", threshold=-1)
    summary = check_accounting(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*_stats.json"))) + len(summary["failed_shards"]) == 60
    for path in (tmp_path / "out").glob("*.tar"):
        members = tar_members(path)
        damaged = tmp_path / "in" / path.name
        for (image, image_data), (caption, caption_data) in zip(members[::2], members[1::2], strict=True):
            assert image.partition(".")[0] == caption.partition(".")[0]
            untouched = {data for name, data in original.items() if data in damaged.read_bytes()}
            for name, data in ((image, image_data), (caption, caption_data)):
                assert data == original.get(name, data) or original[name] not in untouched
