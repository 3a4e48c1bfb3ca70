import bz2
import gzip
import io
import lzma
import re
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.shards.file_type import describe_file
from tests.support.toys import pair, write_shard


def zipped(tar: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("0.jpg", tar)
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"url": ["a"]}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lzma.compress, "compressed with xz; shards are .tar, .tar.gz or .tar.zst"),
        (bz2.compress, "compressed with bzip2; shards are"),
        (zipped, "a zip archive; shards are"),
        (lambda tar: gzip.compress(gzip.compress(tar)), "compressed twice; unpack it once: gunzip"),
        (lambda tar: gzip.compress(zstandard.compress(tar)), "compressed twice; unpack it once: unzstd"),
        (lambda tar: b"s3://bucket/{00..99}.tar\r\nb.tar.gz\n", "a list of shards; write @ before its name"),
        (lambda tar: "\ufeffa b/ü.TAR".encode(), "a list of shards; write @ before its name"),
        (lambda tar: parquet(), "a parquet file; clipfilter-wds table"),
        (lambda tar: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS; .* git lfs pull"),
        (lambda tar: b"\n<!DOCTYPE html><html><body>404</body></html>", "HTML or XML.*; .* download the shard again"),
        (lambda tar: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "HTML or XML"),
        (lambda tar: b'{"error": "rate limit"}' + bytes(1000), "JSON; .* if it is an error message, .* download"),
        (lambda tar: b'{"image": "a.jpg", "caption": "a"}\n', "JSON; clipfilter-wds table filters .jsonl files"),
        (lambda tar: b"url,caption\na.jpg,a\n", "a text file; clipfilter-wds table filters .csv and .tsv files"),
        (lambda tar: b"\xef\xbb\xbfalt text\turl\r\na\tb\r\n", "a text file; clipfilter-wds table filters .csv"),
    ],
)
def test_a_shard_that_is_something_else_fails_with_what_it_is_and_what_to_do(scorer, tmp_path, make, says):
    tar = write_shard(tmp_path / "in" / "0.tar", [pair(1)])
    (tmp_path / "in" / "1.tar").write_bytes(make(tar.read_bytes()))
    config = ScoreConfig(shards=str(tmp_path / "in" / "*.tar"), output=tmp_path / "out", num_workers=0)
    tally = process_shards(config, scorer)
    assert tally.counts.seen == 1  # the other shard is not affected
    [why] = tally.failed.values()
    assert why.startswith("it is not a tar archive, but ")
    assert re.search(says, why), why


def test_what_is_of_no_known_kind_is_not_described():
    assert describe_file(b"") is None
    assert describe_file(b"garbage" * 100) is None
