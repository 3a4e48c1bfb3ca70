import multiprocessing

import pytest

from clipfilter_wds.storage.filesystem import check_installed, local_path
from clipfilter_wds.storage.paths import any_path
from clipfilter_wds.storage.publish import publish_json
from tests.support.pace import FOREVER
from tests.support.servers import DATA
from tests.support.toys import read_whole


def test_parent_and_forked_workers_use_one_storage_at_once(storage):
    """A fork takes the parent's connections with it; neither may get in the other's way, as DataLoader workers do."""
    fork = multiprocessing.get_context("fork")
    for _ in range(5):
        assert read_whole("s3://bucket/0.tar") == DATA  # connections are open when the workers begin
        workers = [fork.Process(target=_read_twice) for _ in range(2)]
        for worker in workers:
            worker.start()
        for number in range(5):
            publish_json(any_path(f"s3://bucket/uploaded/{number}.json"), {})
        for worker in workers:
            worker.join(FOREVER)
            assert worker.exitcode == 0


def _read_twice() -> None:
    assert read_whole("s3://bucket/0.tar") == read_whole("s3://bucket/0.tar") == DATA


def test_only_files_of_this_machine_have_a_local_path(tmp_path):
    assert local_path(f"file://{tmp_path}/a.tar") == local_path(f"{tmp_path}/a.tar") == tmp_path / "a.tar"
    assert local_path("memory://x/a.tar") is None
    assert local_path("simplecache::https://host/a.tar") is None


def test_a_scheme_is_checked_without_connecting():
    check_installed("https://nobody.invalid/a.tar")
    check_installed("nothing-like-this://a.tar")
    check_installed("filecache::https://nobody.invalid/a.tar")
    with pytest.raises(ValueError, match=r"gdrive:// needs a package that is not installed: .*gdrive_?fs"):
        check_installed("gdrive://bucket/a.tar")
