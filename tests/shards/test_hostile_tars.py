"""Tars that were made to do harm, or damaged at random, through the real stream."""

import gzip
import hashlib
import io
import random
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from clipfilter_wds.offline.config import RewriteConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.shards.open import open_shard
from clipfilter_wds.shards.samples import SampleLayout, read_samples
from clipfilter_wds.types import DropReason, ShardError
from tests.support.outputs import check_accounting
from tests.support.restore import numbered_pair
from tests.support.toys import encoded, pair, photo, raw_member, tar_bytes, tar_members, write_shard, write_tar

END = bytes(2 * tarfile.BLOCKSIZE)

# --- names ---

ODD_KEYS = {
    "way up": "../../up",
    "way up within": "a/../../../b",
    "absolute": "/tmp/absolute",
    "nul": "a\0b",
    "other nul": "a\0c",
    "long": "x" * 4096,
    "deep": "d/" * 2000 + "x",
    "not utf-8": b"\xff\xfe".decode("utf-8", "surrogateescape"),
    "escape code": "\x1b[31mred\x07",
    "line end": "two\nlines",
    "right to left": "a\u202eb",
    "space": " ",
    "drive": "C:\\evil",
}


def pax_member(name: str, data: bytes) -> bytes:
    """A member whose name stands in an extended header, as any name can."""
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = len(data), {"path": name}
    return raw_member(info, data, tarfile.PAX_FORMAT)


def read_all(path: Path) -> tuple[list, object]:
    with open_shard(str(path)) as shard:
        *samples, end = read_samples(shard, SampleLayout())
    return samples, end


def test_samples_of_any_name_are_kept_under_it_and_nothing_leaves_the_folder(scorer, tmp_path):
    members = [
        (f"{key}.{extension}", data)
        for number, key in enumerate(ODD_KEYS.values())
        for extension, data in pair(number).items()
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(b"".join(pax_member(*member) for member in members) + END)
    config = RewriteConfig(shards=f"{tmp_path}/in/*.tar", output=tmp_path / "out", threshold=0.0, num_workers=0)
    tally = process_shards(config, scorer)
    assert (tally.counts.seen, tally.counts.kept) == (len(ODD_KEYS), len(ODD_KEYS))
    there, here = read_all(tmp_path / "in" / "0.tar")[0], read_all(tmp_path / "out" / "0.tar")[0]
    assert [[(m.name, m.data) for m in sample.members] for sample in here] == [
        [(m.name, m.data) for m in sample.members] for sample in there
    ]
    assert [sample.key for sample in here] == [sample.key for sample in there]
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    outputs = {"out/0.tar", "out/0_stats.json", "out/sizes.json", "out/summary.json", "out/_scores/0.parquet"}
    assert files == {"in/0.tar", *outputs}
    assert not Path("/tmp/absolute.jpg").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
)
def test_a_link_or_device_in_place_of_an_image_is_a_missing_image(scorer, tmp_path, kind):
    (tmp_path / "secret.jpg").write_bytes(encoded(photo(1)))
    info = tarfile.TarInfo("0.jpg")
    info.type, info.linkname, info.devmajor, info.devminor = kind, str(tmp_path / "secret.jpg"), 1, 5
    data = raw_member(info) + tar_bytes([("0.txt", b"a photo"), *((f"1.{ext}", data) for ext, data in pair(1).items())])
    (tmp_path / "0.tar").write_bytes(data)
    tally = process_shards(
        RewriteConfig(shards=tmp_path / "0.tar", output=tmp_path / "out", threshold=0.0, num_workers=0), scorer
    )
    assert tally.counts.dropped == {DropReason.MISSING_IMAGE: 1}
    assert [name for name, _ in tar_members(tmp_path / "out" / "0.tar")] == ["1.jpg", "1.txt"]


def test_a_tar_inside_a_tar_is_a_member_like_any_other(scorer, tmp_path):
    inner = tar_bytes([(f"inner.{ext}", data) for ext, data in pair(1).items()])
    write_shard(tmp_path / "0.tar", [{**pair(2), "tar": inner}, {"tar": inner}])
    config = RewriteConfig(shards=tmp_path / "0.tar", output=tmp_path / "out", threshold=0.0, num_workers=0)
    assert process_shards(config, scorer).counts.dropped == {DropReason.MISSING_IMAGE: 1}
    names = [name for name, _ in tar_members(tmp_path / "out" / "0.tar")]
    assert names == ["000000000.jpg", "000000000.txt", "000000000.tar"]
    assert dict(tar_members(tmp_path / "out" / "0.tar"))["000000000.tar"] == inner


def test_a_file_of_a_kilobyte_that_declares_8_gib_is_torn_and_costs_nothing(scorer, tmp_path):
    info = tarfile.TarInfo("1.jpg")
    info.size = 8 << 30
    (tmp_path / "0.tar").write_bytes(raw_member(info, b"little"))
    config = RewriteConfig(shards=tmp_path / "0.tar", output=tmp_path / "out", num_workers=0)
    tally = process_shards(config, scorer)
    assert tally.counts.dropped == {DropReason.TORN: 1}


def test_a_sparse_member_that_declares_8_gib_of_holes_is_too_large_and_takes_no_memory(tmp_path):
    info = tarfile.TarInfo("1.jpg")
    info.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.name": "1.jpg",
        "GNU.sparse.size": str(8 << 30),
        "GNU.sparse.map": "0,0",
    }
    data = raw_member(info, b"", tarfile.PAX_FORMAT) + tar_bytes([("1.txt", b"a caption")])
    (tmp_path / "0.tar").write_bytes(data)
    tracemalloc.start()
    try:
        [sample], end = read_all(tmp_path / "0.tar")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert (sample.problem, end.torn) == (DropReason.MEMBER_TOO_LARGE, False)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_name_of_more_than_a_mebibyte_ends_the_shard_as_torn_and_takes_no_memory(tmp_path, kind):
    name = b"a" * (16 << 20)
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, len(name)
    data = tar_bytes([("0.txt", b"a")])[: 2 * tarfile.BLOCKSIZE] + raw_member(info, name) + tar_bytes([("1.txt", b"")])
    (tmp_path / "0.tar").write_bytes(data)
    tracemalloc.start()
    try:
        [sample], end = read_all(tmp_path / "0.tar")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert (sample.problem, end.torn) == (DropReason.TORN, True)


# --- compressed shards ---


def gzip_of_zeros(num_bytes: int) -> bytes:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        for _ in range(num_bytes >> 20):
            file.write(bytes(1 << 20))
    return packed.getvalue()


def zstd_of_zeros(num_bytes: int) -> bytes:
    packer = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(num_bytes >> 20)) + packer.flush()


@pytest.mark.parametrize("pack", [gzip_of_zeros, zstd_of_zeros])
@pytest.mark.parametrize("where", ["in a member", "behind the end"])
def test_a_compressed_bomb_fails_the_shard_alone_and_is_not_unpacked(scorer, tmp_path, pack, where):
    big = tarfile.TarInfo("bomb.jpg")
    big.size = 10 << 40
    front = tar_bytes([(f"0.{ext}", data) for ext, data in pair(0).items()])
    front = front[: -len(front.partition(END)[2]) or None] if where == "behind the end" else raw_member(big)
    packed = {gzip_of_zeros: gzip.compress, zstd_of_zeros: zstandard.ZstdCompressor().compress}[pack](front)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(packed + pack(512 << 20))
    write_shard(tmp_path / "in" / "1.tar", [pair(1)])
    config = RewriteConfig(shards=f"{tmp_path}/in/*.tar", output=tmp_path / "out", threshold=0.0, num_workers=0)
    began = time.process_time()
    tally = process_shards(config, scorer)
    assert time.process_time() - began < 20
    assert list(tally.failed) == [f"{tmp_path}/in/0.tar"]
    assert "over 200 times as many" in tally.failed[f"{tmp_path}/in/0.tar"]
    assert tally.counts.kept == 1


def test_a_shard_that_packs_well_is_no_bomb(tmp_path):
    members = [(f"{key:05d}.{ext}", data) for key in range(2000) for ext, data in (("jpg", b"x" * 9), ("txt", b"same"))]
    (tmp_path / "0.tar").write_bytes(gzip.compress(tar_bytes(members)))
    assert read_all(tmp_path / "0.tar")[1].num_samples == 2000


@pytest.mark.parametrize("damage", [lambda data: data[:10] + b"\xff" * 20 + data[30:], lambda data: data[:6]])
@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_a_compressed_shard_damaged_at_its_very_beginning_is_an_error_and_not_an_empty_shard(tmp_path, pack, damage):
    (tmp_path / "0.tar").write_bytes(damage(pack(tar_bytes([("0.jpg", b"1"), ("0.txt", b"2")]))))
    with pytest.raises(ShardError, match=r"damaged at its very beginning|not a tar archive"):
        read_all(tmp_path / "0.tar")


def test_a_gzip_whose_checksum_is_wrong_is_torn(tmp_path):
    packed = bytearray(gzip.compress(tar_bytes([("0.jpg", b"1"), ("0.txt", b"2"), ("1.jpg", b"3"), ("1.txt", b"4")])))
    packed[-5] ^= 1
    (tmp_path / "0.tar").write_bytes(packed)
    samples, end = read_all(tmp_path / "0.tar")
    assert end.torn
    assert [sample.problem for sample in samples] == [None, DropReason.TORN]


# --- random damage ---


def mutated(data: bytes, rng: random.Random, *, moves: bool) -> bytes:
    """The data with some bytes flipped or zeroed, or also with pieces of it lost, doubled or moved."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, size = rng.randrange(len(changed)), rng.choice((1, 7, 512, 1024, 5000))
        match rng.randrange(8) if moves else rng.randrange(2, 8):
            case 0:
                del changed[at : at + size]
            case 1:
                changed[at:at] = changed[at : at + size]
            case 2:
                changed[at : at + size] = bytes(len(changed[at : at + size]))
            case 3 if moves:
                there = rng.randrange(len(changed))
                changed[at : at + size] = changed[there : there + size]
            case _:  # most of all in headers
                header = at // 512 * 512 + rng.randrange(512)
                changed[min(header, len(changed) - 1)] ^= rng.randrange(1, 256)
        if not changed:
            return b""
    return bytes(changed)


def _caption(number: int) -> bytes:
    """A caption that no few flipped bytes make another one of."""
    return hashlib.sha256(bytes([number])).hexdigest().encode()


class Original:
    """Shards that are damaged, and which sample each of their bytes belong to."""

    def __init__(self) -> None:
        members = [
            (f"{'long-' * 30 if number == 2 else ''}{number:03d}.{ext}", data)
            for number in range(6)
            for ext, data in {"png": numbered_pair(number)["png"], "txt": _caption(number)}.items()
        ]
        self.number_of = {data: int(name.split(".")[0][-3:]) for name, data in members}
        tars = [tar_bytes(members, format=kind) for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
        tars.append(tar_bytes([(name[-7:], data) for name, data in members], format=tarfile.USTAR_FORMAT))
        self.shards = [*tars, gzip.compress(tars[0]), zstandard.ZstdCompressor(write_checksum=True).compress(tars[0])]

    def check_pairs(self, tar: Path) -> None:
        """No kept sample holds the image of one pair and the caption of another."""
        samples, _ = read_all(tar)
        for sample in samples:
            numbers = {self.number_of[member.data] for member in sample.members if member.data in self.number_of}
            assert len(numbers) <= 1, (tar, sample.key)


def check_damaged_shards(scorer, folder: Path, num_shards: int, seed: int) -> int:
    """Rewrite shards that were damaged at random; how many could be used."""
    original, rng = Original(), random.Random(seed)
    for number in range(num_shards):
        data = original.shards[number % len(original.shards)]
        moves = number // len(original.shards) % 2 == 1
        (folder / "in").mkdir(exist_ok=True)
        (folder / "in" / f"{number:05d}.tar").write_bytes(mutated(data, rng, moves=moves))
    config = RewriteConfig(shards=f"{folder}/in/*.tar", output=folder / "out", threshold=0.0, num_workers=1)
    tally = process_shards(config, scorer)
    assert tally.done + len(tally.failed) == num_shards
    check_accounting(folder / "out")
    for tar in (folder / "out").glob("*.tar"):
        # A tar has no checksum of its data: what was put in the place of other data can't be told from it.
        if int(tar.stem) // len(original.shards) % 2 == 0:
            original.check_pairs(tar)
    return tally.done


def test_shards_damaged_at_random_never_crash_hang_mix_or_lose(scorer, tmp_path):
    assert check_damaged_shards(scorer, tmp_path, 150, seed=0) > 75


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_five_thousand_shards_damaged_at_random_never_crash_hang_mix_or_lose(scorer, tmp_path):
    assert check_damaged_shards(scorer, tmp_path, 5000, seed=1) > 2500


def test_the_check_for_mixed_pairs_finds_one(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.png", numbered_pair(1)["png"]), ("0.txt", _caption(2))])
    with pytest.raises(AssertionError):
        Original().check_pairs(tmp_path / "0.tar")
