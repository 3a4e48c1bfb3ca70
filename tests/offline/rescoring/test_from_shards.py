"""From shards to shards: scored with embeddings, rescored or without near-duplicates, rewritten."""

import io
import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from clipfilter_wds import ClipScorer
from clipfilter_wds.cli import main
from clipfilter_wds.demo.drawing import draw, to_jpeg
from clipfilter_wds.demo.scenes import describe, random_scene
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.rescoring.config import DedupConfig
from clipfilter_wds.offline.rescoring.run import rescore_shards
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.scores.table import ShardScores
from tests.support.toys import tar_members, write_shard

NUM_SCENES, PER_SHARD = 60, 40


def reencoded(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=60)
    return file.getvalue()


def cropped(picture: Image.Image) -> bytes:
    """Less a twentieth at each side."""
    width, height = picture.size
    return to_jpeg(picture.crop((width // 20, height // 20, width - width // 20, height - height // 20)))


COPIES = {"exact": to_jpeg, "reencoded": reencoded, "cropped": cropped}


def kind_of(scene: int) -> str:
    """How a scene's copy is made."""
    return [*COPIES][scene % len(COPIES)]


def write_copies(folder) -> dict[str, int]:
    """Shards of scenes and a copy of each; by key, the scene's number."""
    rng, samples = random.Random(0), []
    for number in range(NUM_SCENES):
        scene = random_scene(rng, held_out=False)
        for encode in (to_jpeg, COPIES[kind_of(number)]):
            samples.append({"jpg": encode(draw(scene)), "txt": describe(scene, rng).encode()})
    order = rng.sample(range(len(samples)), len(samples))
    for start in range(0, len(order), PER_SHARD):
        shard = [samples[place] for place in order[start : start + PER_SHARD]]
        write_shard(folder / f"{start // PER_SHARD:05d}.tar", shard, start=start)
    return {f"{number:09d}": place // 2 for number, place in enumerate(order)}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    scenes = write_copies(folder / "data")
    config = ScoreConfig(shards=f"{folder}/data/*.tar", output=folder / "scores", embeddings="fp16", num_workers=0)
    process_shards(config, ClipScorer("demo-tiny", device="cpu", precision="fp32"))
    return folder, scenes


def keys_of(folder) -> list[str]:
    return [name[:-4] for path in sorted(folder.glob("*.tar")) for name, _ in tar_members(path) if name.endswith("jpg")]


def test_commands_go_from_scores_to_shards(scored, tmp_path, capsys):
    folder, _ = scored
    for command in (
        f"rescore {folder}/scores --output {tmp_path}/neg --method neg_clip_loss --device cpu",
        f"rescore {tmp_path}/neg,{folder}/scores --output {tmp_path}/both --method then --fractions 0.5,0.25",
        f"rewrite {folder}/data/*.tar --scores {tmp_path}/both --keep_fraction 1 --output {tmp_path}/kept",
    ):
        with pytest.raises(SystemExit) as end:
            main(command.split())
        assert end.value.code == 0
    assert "next: clipfilter-wds rewrite" in capsys.readouterr().out
    tables = {name: ShardScores.read(tmp_path / "neg" / f"{name}.parquet") for name in ("00000", "00001", "00002")}
    scores = {key: score for table in tables.values() for key, score in zip(table.keys, table.scores, strict=True)}
    best = set(sorted(scores, key=scores.get, reverse=True)[:60])
    kept = keys_of(tmp_path / "kept")
    assert len(kept) == 30
    assert set(kept) < best
    summary = json.loads((tmp_path / "kept" / "summary.json").read_bytes())
    assert (summary["seen"], summary["kept"], summary["dropped"]) == (120, 30, {"not_selected": 90})


def test_scores_of_another_kind_have_no_default_threshold(scored, tmp_path):
    folder, _ = scored
    with pytest.raises(SystemExit):
        main(f"rescore {folder}/scores --output {tmp_path}/neg --method neg_clip_loss --device cpu".split())
    with pytest.raises(ValueError, match="neg_clip_loss"):
        RewriteConfig(shards=f"{folder}/data/*.tar", scores=tmp_path / "neg", output=tmp_path / "out")


def found_copies(scored, output, similarity) -> tuple[dict[str, float], float]:
    """Per kind of copy, the share of scenes of which at most one picture is kept; and that of which none is."""
    folder, scenes = scored
    rescore_shards(DedupConfig(scores=folder / "scores", output=output, similarity=similarity, device="cpu"))
    tables = [ShardScores.read(path) for path in sorted(output.glob("*.parquet"))]
    kept = Counter(
        scenes[key] for table in tables for key, usable in zip(table.keys, table.usable, strict=True) if usable
    )
    of_kind = {kind: [kept[scene] for scene in range(NUM_SCENES) if kind_of(scene) == kind] for kind in COPIES}
    found = {kind: float(np.mean(np.array(counts) <= 1)) for kind, counts in of_kind.items()}
    return found, float(np.mean([kept[scene] == 0 for scene in range(NUM_SCENES)]))


def test_copies_are_found_and_few_distinct_scenes_with_them(scored, tmp_path, capsys):
    """The tiny CLIP hardly knows some scenes from others: 0.95 suits larger ones."""
    for similarity in (0.95, 0.99):
        found, lost = found_copies(scored, tmp_path / f"{similarity}", similarity)
        with capsys.disabled():
            print(f"\n{similarity}: found {found}, distinct scenes lost {lost:.3f}")
        assert found["exact"] == 1.0
        assert found["reencoded"] > 0.9
        assert lost < 0.1
