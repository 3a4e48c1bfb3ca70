import functools
import gzip
import http.server
import os
import random
import threading
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import pytest
import zstandard
from hypothesis import given, settings

from clipfilter_wds.shards.open import DamagedStreamError, open_shard
from clipfilter_wds.shards.samples import SampleLayout, read_samples
from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.types import DropReason, ShardError
from tests.support.toys import read_whole, tar_bytes, write_shard, write_tar


def sample_bytes(url: str, *, allow_pipe: bool = False):
    """Members of the samples without a problem, and how the shard ended."""
    with open_shard(url, allow_pipe=allow_pipe) as shard:
        *samples, end = read_samples(shard, SampleLayout())
    return [(member.name, member.data) for sample in samples for member in sample.members], end


# --- compressed shards ---


noise = random.Random(0)

PAIRS = [
    (f"{key:04d}.{ext}", data)
    for key in range(60)
    for ext, data in [("jpg", noise.randbytes(4000)), ("txt", f"caption number {key} ".encode() * 20)]
]

TAR = tar_bytes(PAIRS)


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def skippable_frame(data: bytes) -> bytes:
    """A Zstandard frame that readers pass over: pzstd begins with one, seekable files end with one."""
    return b"\x50\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


PACKED = {
    "plain": TAR,
    "gzip": gzip.compress(TAR),
    "gzip of many members": b"".join(gzip.compress(TAR[at : at + 10_000]) for at in range(0, len(TAR), 10_000)),
    "gzip with padding": gzip.compress(TAR) + bytes(1000),
    "zstd": zstd(TAR),
    "zstd of many frames": b"".join(zstd(TAR[at : at + 10_000]) for at in range(0, len(TAR), 10_000)),
    "zstd with a seek table": zstd(TAR) + skippable_frame(b"seek table"),
    "zstd as pzstd writes it": skippable_frame(bytes(4)) + zstd(TAR),
    "zstd without content size": zstandard.ZstdCompressor(write_content_size=False).compress(TAR),
}


@pytest.mark.parametrize("packing", PACKED)
def test_a_compressed_shard_is_unpacked_by_its_magic_bytes_whatever_its_name(tmp_path, packing):
    path = tmp_path / "0.tar"
    path.write_bytes(PACKED[packing])
    assert read_whole(str(path)) == TAR
    members, end = sample_bytes(str(path))
    assert members == PAIRS
    assert (end.num_samples, end.torn, end.num_bytes) == (60, False, len(PACKED[packing]))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5])
def test_files_shorter_than_any_magic_are_read_as_they_are(tmp_path, size):
    path = tmp_path / "0.tar"
    path.write_bytes(b"tiny!"[:size])
    assert read_whole(str(path)) == b"tiny!"[:size]


def check_damaged(path: Path) -> None:
    """Whatever the damage: whole samples as they were, then at most one torn, or a ShardError."""
    try:
        with open_shard(str(path)) as shard:
            *samples, end = read_samples(shard, SampleLayout())
    except ShardError:
        return
    assert [sample.index for sample in samples] == list(range(end.num_samples))
    assert [sample.problem for sample in samples] == [
        DropReason.TORN if end.torn and sample.index == end.num_samples - 1 else None for sample in samples
    ]
    usable = [(member.name, member.data) for sample in samples for member in sample.members]
    assert usable == PAIRS[: len(usable)]


compressions = [name for name in PACKED if name != "plain"]


@settings(max_examples=100)
@given(st.sampled_from(compressions), st.floats(0, 1))
def test_a_truncated_compressed_shard_is_torn_and_its_whole_samples_are_used(tmp_path_factory, packing, share):
    path = tmp_path_factory.getbasetemp() / "truncated.tar"
    packed = PACKED[packing]
    path.write_bytes(packed[: int(share * len(packed))])
    check_damaged(path)


@pytest.mark.parametrize("packing", ["gzip", "zstd", "gzip of many members", "zstd of many frames"])
def test_half_of_a_compressed_shard_still_yields_samples(tmp_path, packing):
    path = tmp_path / "0.tar"
    path.write_bytes(PACKED[packing][: len(PACKED[packing]) // 2])
    members, end = sample_bytes(str(path))
    assert end.torn
    assert members == PAIRS[: len(members)]
    assert members


@settings(max_examples=100)
@given(st.sampled_from(compressions), st.floats(0, 1, exclude_max=True), st.binary(min_size=8, max_size=64))
def test_a_corrupted_compressed_shard_never_raises_anything_else(tmp_path_factory, packing, share, garbage):
    path = tmp_path_factory.getbasetemp() / "corrupted.tar"
    packed = bytearray(PACKED[packing])
    at = int(share * len(packed))
    packed[at : at + len(garbage)] = garbage
    path.write_bytes(packed)
    try:
        _, end = sample_bytes(str(path))
    except ShardError:
        return
    assert end.num_samples <= 60


def test_a_damaged_stream_has_one_kind_of_error(tmp_path):
    path = tmp_path / "0.tar"
    for packed in (PACKED["gzip"][:-100], gzip.compress(TAR)[:-8] + bytes(8), zstd(TAR)[:-4] + bytes(4)):
        path.write_bytes(packed)
        with pytest.raises(DamagedStreamError):
            read_whole(str(path))


# --- opening ---


@pytest.mark.parametrize("url", ["missing.tar", "file:///missing.tar", "sub"])
def test_what_can_not_be_opened_is_a_shard_error(folder, url):
    with pytest.raises(ShardError, match="can't open it: "):
        read_whole(url)


def test_a_pipe_is_only_run_when_it_is_allowed(tmp_path):
    path = write_tar(tmp_path / "0.tar", PAIRS)
    touched = tmp_path / "ran"
    url = f"pipe:touch {touched}; cat {path}"
    with pytest.raises(ShardError, match="allow_pipe=True"):
        read_whole(url)
    assert not touched.exists()
    assert read_whole(url, allow_pipe=True) == TAR
    assert touched.exists()
    assert sample_bytes(url, allow_pipe=True)[1].num_bytes == -1


def test_a_compressed_shard_is_unpacked_from_a_pipe_that_delivers_slowly(tmp_path):
    path = tmp_path / "0"
    path.write_bytes(PACKED["zstd"])
    url = f"pipe:head -c 2 {path}; sleep 0.2; tail -c +3 {path}"
    assert read_whole(url, allow_pipe=True) == TAR


@pytest.mark.parametrize(
    "command",
    ["cat {missing}", "cat {path}; exit 3", "head -c 100000 {path}; exit 3", "false"],
    ids=["no file", "fails at the end", "fails halfway", "nothing"],
)
def test_a_pipe_whose_command_fails_is_a_shard_error_and_not_a_short_shard(tmp_path, command):
    path = write_tar(tmp_path / "0.tar", PAIRS)
    url = "pipe:" + command.format(path=path, missing=tmp_path / "missing")
    with pytest.raises(ShardError):
        sample_bytes(url, allow_pipe=True)


def test_a_pipe_that_is_not_read_to_its_end_is_closed_quietly(tmp_path):
    path = write_tar(tmp_path / "0.tar", PAIRS)
    with path.open("ab") as file:
        file.write(bytes(4 << 20))
    members, end = sample_bytes(f"pipe:cat {path}", allow_pipe=True)
    assert members == PAIRS
    assert not end.torn


# --- HTTP ---


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and under /short/ promises more bytes than it sends."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        kind, _, name = self.path.partition("?")[0].lstrip("/").partition("/")
        if kind == "short":
            self._send_short(Path(self.directory, name).read_bytes())
        elif kind == "streamed":
            self._send_streamed(Path(self.directory, name).read_bytes())
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        kind, _, name = self.path.partition("?")[0].lstrip("/").partition("/")
        if kind == "short":
            self._send_head(Path(self.directory, name).stat().st_size)
        elif kind == "streamed":
            self._send_head(None)
        else:
            super().do_HEAD()

    def _send_head(self, num_bytes: int | None) -> None:
        self.send_response(200)
        if num_bytes is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(num_bytes))
        self.end_headers()

    def _send_short(self, data: bytes) -> None:
        self._send_head(len(data))
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True

    def _send_streamed(self, data: bytes) -> None:
        """Without a length, and the first bytes one by one."""
        self._send_head(None)
        for piece in [data[:1], data[1:2], data[2:3], data[3:]]:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.flush()
            threading.Event().wait(0.05)
        self.wfile.write(b"0\r\n\r\n")


@contextmanager
def served(folder: Path):
    """The address of an HTTP server of a folder on this machine."""
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def web(tmp_path, short_pauses):
    (tmp_path / "0.tar").write_bytes(TAR)
    (tmp_path / "0.tar.zst").write_bytes(PACKED["zstd"])
    with served(tmp_path) as address:
        yield address


@pytest.mark.parametrize("path", ["0.tar", "0.tar.zst", "0.tar?token=a"])
def test_a_shard_is_read_over_http(web, path):
    urls = expand_shards(f"{web}/{path}")
    assert urls == [f"{web}/{path}"]
    members, end = sample_bytes(urls[0])
    assert members == PAIRS
    assert end.num_bytes == len(PACKED["zstd"] if "zst" in path else TAR)


def test_a_missing_shard_over_http_is_a_shard_error(web):
    [url] = expand_shards(f"{web}/missing.tar")
    with pytest.raises(ShardError, match="can't open it: there is no such file"):
        read_whole(url)


def test_a_server_that_is_not_there_is_a_shard_error(tmp_path, short_pauses):
    with served(tmp_path) as address:
        pass
    with pytest.raises(ShardError, match="can't open it"):
        read_whole(f"{address}/0.tar")


def test_a_body_cut_short_of_its_length_is_a_shard_error_and_never_a_short_shard(web):
    with pytest.raises(ShardError, match=r"reading failed|connection ended"):
        sample_bytes(f"{web}/short/0.tar")


@pytest.mark.parametrize("name", ["0.tar", "0.tar.zst"])
def test_a_body_that_comes_in_small_pieces_without_a_length_is_read_whole(web, name):
    members, end = sample_bytes(f"{web}/streamed/{name}")
    assert members == PAIRS
    assert end.num_bytes == -1


def test_a_large_shard_is_read_from_a_server_without_range_requests(tmp_path):
    """Such as `python -m http.server`."""
    members = [(f"{key}.{ext}", bytes([key]) * (1 << 20)) for key in range(6) for ext in ("jpg", "txt")]
    write_tar(tmp_path / "large.tar", members)
    with served(tmp_path) as address:
        assert sample_bytes(f"{address}/large.tar")[0] == members


def test_a_shard_that_shrinks_while_it_is_read_is_a_shard_error_with_the_position(tmp_path):
    path = write_shard(tmp_path / "0.tar", [{"jpg": os.urandom(1 << 20), "txt": b"x"}] * 3)
    with open_shard(f"file://{path}") as shard:
        os.truncate(path, 1 << 20)
        with pytest.raises(ShardError, match=r"after 1048576 of \d+ bytes; try again"):
            shard.stream.read()


def test_a_shard_that_takes_much_memory_to_unpack_is_not_called_damaged(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "0.tar").write_bytes(packer.compress(TAR) + packer.flush())
    with pytest.raises(ShardError, match=r"more than 128 MiB of memory, .* pack it anew without --long"):
        read_whole(str(tmp_path / "0.tar"))
