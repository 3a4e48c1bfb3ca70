"""What a report is made of and where, and that it replaces web pages only."""

import errno
import os
import shutil
from pathlib import Path

import fsspec
import pytest

from clipfilter_wds.report.config import ReportConfig, check_page
from clipfilter_wds.report.run import write_report
from tests.report.conftest import page_data


def test_unusable_arguments_are_refused(run, tmp_path, command):
    for arguments, complaint in [
        ((run.shards, "--output", tmp_path / "r.html"), "there is no score table"),
        (("memory://scores", "--output", tmp_path / "r.html"), "tables of this machine"),
        ((run.output, "--output", tmp_path), "is a folder; name a file"),
        ((run.output, "--output", f"{tmp_path}/pages/"), "is a folder; name a file"),
        ((run.output, "--output", tmp_path / "r.html", "--threshold", "25"), "Did you mean 0.25?"),
        ((run.output, "--output", tmp_path / "r.html", "--thumbnails", "900"), "0..200"),
        ((run.output, "--output", tmp_path / "r.html", "--shards", tmp_path / "no.tar"), "no shard matches"),
    ]:
        code, said = command("report", *arguments)
        assert (code, complaint in said) == (2, True), said
    assert list(tmp_path.iterdir()) == []


def test_only_a_web_page_is_replaced_and_no_data(run, tmp_path, command):
    shards = shutil.copytree(run.shards, tmp_path / "shards")
    scores = shutil.copytree(run.output / "_scores", tmp_path / "scores")
    (tmp_path / "notes.txt").write_text("notes")
    os.mkfifo(tmp_path / "pipe")
    rewriting = ("rewrite", f"{shards}/*.tar", "--output", tmp_path / "out", "--scores", scores)
    for output, complaint in [
        (shards / "00000.tar", "is no web page"),
        (scores / "00000.parquet", "is no web page"),
        (tmp_path / "notes.txt", "is no web page"),
        (tmp_path / "pipe", "is no ordinary file"),
        (scores, "is a folder; name a file"),
    ]:
        before = output.read_bytes() if output.is_file() else None
        for words in (
            ("report", scores, "--output", output),
            (*rewriting, "--report", output),
            (*rewriting, "--report", output, "--dry_run"),
        ):
            code, said = command(*words)
            assert (code, complaint in said) == (2, True), said
        assert output.is_file() == (before is not None)
        assert before is None or output.read_bytes() == before
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("content", ["", "<!DOCTYPE html>\n<html>", "\ufeff\n<HTML lang=en>", "<!-- saved --><html>"])
def test_a_page_or_an_empty_file_is_replaced(run, tmp_path, content):
    (tmp_path / "r.html").write_text(content)
    for _ in range(2):
        write_report(ReportConfig(scores=run.output, output=tmp_path / "r.html"))
        assert page_data(tmp_path / "r.html")["seen"] == 320


def test_a_file_that_can_not_be_read_is_not_replaced(run, tmp_path, monkeypatch):
    def refuse(path, mode="r"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    (tmp_path / "r.html").write_text("<html>")
    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, who may read everything
    with pytest.raises(ValueError, match=r"can't see whether output '.*r.html' is a web page to replace: Permission"):
        check_page(tmp_path / "r.html", of=run.output)


def test_a_page_on_other_storage_is_replaced_and_no_shard_there(run):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/pages/r.html", b"<!doctype html>old")
    fs.pipe_file("/pages/0.tar", b"a shard")
    write_report(ReportConfig(scores=run.output, output="memory://pages/r.html", thumbnails=0))
    assert len(fs.cat_file("/pages/r.html")) > 10_000
    with pytest.raises(ValueError, match=r"pages/0.tar' is there and is no web page"):
        ReportConfig(scores=run.output, output="memory://pages/0.tar")
