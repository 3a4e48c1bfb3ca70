import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from clipfilter_wds.scores.subset import UID, Subset


def uid_array(uids: list[int]) -> np.ndarray:
    """As DataComp writes them: sorted pairs of halves."""
    return np.array(sorted(divmod(uid, 2**64) for uid in uids), dtype=UID)


# Few upper halves, so that many uids differ in the lower one only.
uids = st.builds(lambda high, low: high << 64 | low, st.sampled_from([0, 1, 2**63, 2**64 - 1]), st.integers(0, 3)) | (
    st.integers(0, 2**128 - 1)
)


@settings(max_examples=200)
@given(st.lists(uids, max_size=20), st.lists(st.none() | uids, max_size=20))
def test_a_sample_is_held_when_its_uid_is_listed(tmp_path_factory, listed, asked):
    path = tmp_path_factory.mktemp("subset") / "uids.npy"
    np.save(path, uid_array(listed))
    found = Subset(path).holds([""] * len(asked), [None if uid is None else uid.to_bytes(16) for uid in asked])
    assert found.tolist() == [uid in listed for uid in asked]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_of_keys_is_one_per_line(tmp_path, encoding):
    (tmp_path / "keys.txt").write_bytes("000000001\r\n  a/b \n \t\n\n\tschlüssel\n000000003".encode(encoding))
    subset = Subset(tmp_path / "keys.txt")
    asked = ["000000001", "a/b", "b", "", "schlüssel", "000000003", "00000000"]
    assert subset.holds(asked, [None] * 7).tolist() == [True, True, False, False, True, True, False]


def test_pickled_it_is_a_path_and_not_the_list(tmp_path):
    np.save(tmp_path / "uids.npy", uid_array(list(range(100_000))))
    subset = Subset(tmp_path / "uids.npy")
    digest = subset.digest
    packed = pickle.dumps(subset)
    assert len(packed) < 1000
    again = pickle.loads(packed)
    assert again == subset
    assert again.digest == digest
    assert again.holds([""], [(7).to_bytes(16)]).tolist() == [True]


class Trap:
    def __reduce__(self):
        return print, ("a pickle has run",)


def refused(path, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        Subset(path)
    assert str(path) in str(error.value)


def test_what_is_no_subset_is_refused_with_what_it_is(tmp_path, capsys):
    path = tmp_path / "uids.npy"
    refused(path, "can't read subset")
    refused(tmp_path, "can't read subset")
    path.write_bytes(b"not numpy")
    refused(path, "no numpy array")
    path.write_bytes(b"")
    refused(path, "no numpy array")
    np.save(path, np.arange(4))
    refused(path, "array of int64 with 1 dim")
    np.save(path, uid_array([1, 2]).reshape(1, 2))
    refused(path, "2 dimensions")
    np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    refused(path, "no numpy array")
    assert "a pickle has run" not in capsys.readouterr().out
    np.save(path, uid_array([*range(2_000_000)])[::-1])
    refused(path, "not sorted from index 0 on; np.sort it")
    for swapped in (1 << 20, (1 << 20) - 1):  # where one checked piece meets the next
        array = uid_array([*range(2_000_000)])
        array[[swapped, swapped + 1]] = array[[swapped + 1, swapped]]
        np.save(path, array)
        refused(path, f"from index {swapped} on")
    (tmp_path / "keys.txt").write_text("\n\n")
    refused(tmp_path / "keys.txt", "lists no key")
    (tmp_path / "keys.txt").write_bytes(b"\x93NUMPY")
    refused(tmp_path / "keys.txt", r"no text.*\.npy")
