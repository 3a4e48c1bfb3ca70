"""Says what a file is that is no tar archive, by its first bytes."""

import re

_REPACK = "shards are .tar, .tar.gz or .tar.zst: unpack it and pack it anew"
_NOT_LOADED = "it was put where the shard should be: download the shard again"

#: What files begin with, what they are then, and what to do.
_KINDS = (
    (b"\x1f\x8b", "compressed twice", "unpack it once: gunzip"),  # what is compressed once has been unpacked here
    (b"\x28\xb5\x2f\xfd", "compressed twice", "unpack it once: unzstd"),
    (b"\xfd7zXZ\0", "compressed with xz", _REPACK),
    (b"BZh", "compressed with bzip2", _REPACK),
    (b"\x04\x22\x4d\x18", "compressed with lz4", _REPACK),
    (b"PK\x03\x04", "a zip archive", _REPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _REPACK),
    (b"Rar!", "a rar archive", _REPACK),
    (b"PAR1", "a parquet file", "clipfilter-wds table filters parquet files"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself: git lfs pull"),
    (b"<", "a page of HTML or XML, such as an error message", _NOT_LOADED),
    (b"{", "JSON", f"clipfilter-wds table filters .jsonl files; if it is an error message, {_NOT_LOADED}"),
)
#: A first line that names a shard.
_LIST = re.compile(rb"[^\0-\x1f]+\.(tar|tgz|tzst|tar\.(gz|zst|zstd))\s*(\n|$)", re.IGNORECASE)
#: A first line that may be the header of a table.
_HEADER = re.compile(rb"\w[\w \"]*([,;|\t][\w \"]+)+\r?\n")


def describe_file(start: bytes) -> str | None:
    """What a file is that begins with these bytes, and what to do; None when it is none of the known kinds."""
    start = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if _LIST.match(start):
        return "a list of shards; write @ before its name"
    if _HEADER.match(start):
        return "a text file; clipfilter-wds table filters .csv and .tsv files"
    return next((f"{what}; {cure}" for magic, what, cure in _KINDS if start.startswith(magic)), None)
