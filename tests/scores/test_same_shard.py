"""Which tables are of the same shard and samples, by what they say of themselves."""

from pathlib import Path

import pytest

from clipfilter_wds.scores.same_shard import check_same_samples, check_same_shard
from clipfilter_wds.types import SampleRow
from tests.support.score_tables import shard_scores


def table(keys: str = "abc", **says):
    return shard_scores([SampleRow(key, index, None) for index, key in enumerate(keys)], **says)


def check(found, expected) -> str | None:
    """What a comparison says, None where it says nothing; the same both ways round."""
    said = []
    for one, other in ((found, expected), (expected, found)):
        try:
            check_same_samples(Path("there.parquet"), one, Path("here.parquet"), other)
            said.append(None)
        except ValueError as error:
            said.append(str(error))
    assert (said[0] is None) == (said[1] is None)
    return said[0]


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({}, {}),
        ({"signature": "s"}, {"signature": "s"}),
        ({"signature": "s", "storage_version": "1"}, {"signature": "s", "storage_version": "2"}),
        ({"signature": "s", "storage_version": "1"}, {"storage_version": "2"}),
        ({"signature": "s", "storage_version": "1"}, {}),
        ({"num_bytes": -1, "signature": "s"}, {"num_bytes": 512, "signature": "s"}),
        ({"num_bytes": -1}, {"num_bytes": 512, "storage_version": "1"}),
        ({"shard": "/moved/0.tar"}, {"shard": "/data/0.tar"}),
    ],
    ids=str,
)
def test_what_nothing_tells_apart_is_the_same_shard(there, here):
    assert check(table(**there), table(**here)) is None


@pytest.mark.parametrize("version", [None, "1"])
def test_another_signature_tells_another_shard_of_the_same_size_and_keys(version):
    here, there = (table(signature=signature, storage_version=version, shard=f"/{signature}.tar") for signature in "ab")
    assert check(there, here) == (
        "'there.parquet' and 'here.parquet' are of different shards: the members of '/b.tar' had other names, sizes or "
        "times than those of '/a.tar'; both must be made of the same shards"
    )


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ({"num_bytes": 512}, "'/data/0.tar' with 3 samples in 512 bytes, and '/data/0.tar' with 3 in 10240; both must"),
        ({"keys": "abcd"}, "'/data/0.tar' with 4 samples in 10240 bytes, and '/data/0.tar' with 3 in 10240; both must"),
    ],
)
def test_another_size_tells_another_shard(there, says):
    assert says in check(table(**there), table())


@pytest.mark.parametrize("keys", ["abd", "acb"])
def test_other_keys_are_other_samples(keys):
    found = {"abd": "key 'd' there, 'c' here", "acb": "key 'c' there, 'b' here"}[keys]
    assert check(table(keys), table()) == (
        f"'there.parquet' holds other samples than 'here.parquet': {found}; both must be made of the same shards"
    )
    check_same_shard(Path("there.parquet"), table(keys).metadata, Path("here.parquet"), table().metadata)
