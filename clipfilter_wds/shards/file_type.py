"""Says what a file is that is no tar archive, by its first bytes."""

_REPACK = "shards are .tar, .tar.gz or .tar.zst: unpack it and pack it anew"
_NOT_LOADED = "it was put where the shard should be: download the shard again"

#: What files begin with, what they are then, and what to do.
_KINDS = (
    (b"\xfd7zXZ\0", "compressed with xz", _REPACK),
    (b"BZh", "compressed with bzip2", _REPACK),
    (b"\x04\x22\x4d\x18", "compressed with lz4", _REPACK),
    (b"PK\x03\x04", "a zip archive", _REPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _REPACK),
    (b"Rar!", "a rar archive", _REPACK),
    (b"PAR1", "a parquet file", "clipfilter-wds table filters parquet files"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself: git lfs pull"),
    (b"<", "a page of HTML or XML, such as an error message", _NOT_LOADED),
    (b"{", "JSON, such as an error message", _NOT_LOADED),
)


def describe_file(start: bytes) -> str | None:
    """What a file is that begins with these bytes, and what to do; None when it is none of the known kinds."""
    start = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    return next((f"{what}; {cure}" for magic, what, cure in _KINDS if start.startswith(magic)), None)
