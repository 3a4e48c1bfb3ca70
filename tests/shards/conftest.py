from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with shards 000.tar to 011.tar and a folder in it."""
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        Path(f"{number:03d}.tar").touch()
    Path("sub/deep").mkdir(parents=True)
    for name in ("sub/a.tar", "sub/b.tar", "sub/deep/c.tar"):
        Path(name).touch()
    return tmp_path
