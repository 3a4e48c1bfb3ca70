import os
from functools import partial

import pytest

from clipfilter_wds.shards.samples import SampleLayout, read_part, read_samples
from clipfilter_wds.shards.split import ShardPart
from clipfilter_wds.types import ShardError
from tests.support.toys import pair, write_shard


@pytest.mark.parametrize("exit_code", [0, 3])
def test_a_shards_end_comes_only_after_closing_has_told_that_it_was_read_whole(tmp_path, exit_code):
    path = write_shard(tmp_path / "0.tar", [pair(number) for number in range(3)])
    os.truncate(path, 1 << 18)  # as much as is read at a time, so that reading meets no end, which tells it too
    part = ShardPart(f"pipe:cat {path}; exit {exit_code}")
    items = read_part(part, partial(read_samples, layout=SampleLayout()), allow_pipe=True)
    assert [next(items).index for _ in range(3)] == [0, 1, 2]
    if exit_code:
        with pytest.raises(ShardError, match="the command failed"):
            next(items)
    else:
        end = next(items)
        assert (end.num_samples, end.torn, end.num_bytes) == (3, False, -1)
    assert list(items) == []
