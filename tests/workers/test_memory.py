from pathlib import Path

import pytest

from clipfilter_wds.workers.memory import check_fits

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n"}
VERSION_2 = {
    "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
    "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
    "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB}\n",
}
UNLIMITED = {**VERSION_2, "sys/fs/cgroup/memory.max": "max\n"}
VERSION_1 = {
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
    "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB}\n",
}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (MEMINFO, 8 * GIB),
        ({**MEMINFO, **VERSION_2}, 2 * GIB),
        ({**MEMINFO, **VERSION_1}, 2 * GIB),
        ({**MEMINFO, **UNLIMITED}, 8 * GIB),
    ],
    ids=["no container", "cgroup 2", "cgroup 1", "no limit"],
)
def test_what_takes_more_than_is_free_is_refused_with_what_is_missing(tmp_path, files, free):
    root = write(tmp_path, files)
    check_fits(free, "it", root=root)
    with pytest.raises(ValueError, match=rf"it: that is .* and {free / GIB:.1f} GiB are free, 1.0 GiB less"):
        check_fits(free + GIB, "it", root=root)


def test_where_nothing_tells_what_is_free_nothing_is_refused(tmp_path):
    check_fits(1 << 60, "it", root=tmp_path)
