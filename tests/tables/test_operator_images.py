"""Images and captions that the original crashes on or hangs at, and images that are elsewhere."""

import logging
import os
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from clipfilter_wds.tables.images import is_remote
from clipfilter_wds.tables.operator import ImageClipFilter
from tests.support.dataflow import Memory, run_operator
from tests.support.pace import FOREVER
from tests.support.toys import encoded, photo


@pytest.fixture(scope="module")
def odd_images(tmp_path_factory):
    """Images that the original crashes on or hangs at, or that it should not open."""
    folder = tmp_path_factory.mktemp("odd")
    whole = encoded(photo(1, (200, 200)), quality=95)
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    png = bytearray(encoded(photo(1), "PNG"))
    png[len(png) // 2] ^= 0xFF
    (folder / "corrupt.png").write_bytes(png)
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "empty.jpg").touch()
    (folder / "folder.jpg").mkdir()
    (folder / "text.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(folder / "pipe.jpg")
    return folder


class TestWhatTheOriginalCrashesOn:
    @pytest.mark.parametrize(
        "name",
        [
            "truncated.jpg",
            "corrupt.png",
            "bomb.png",
            "empty.jpg",
            "folder.jpg",
            "text.eps",
            "pipe.jpg",
            "none.jpg",
            "\0",
        ],
    )
    def test_an_image_that_cannot_be_used_scores_zero(self, operator, odd_images, name):
        assert operator.compute_similarity(str(odd_images / name), "a caption") == 0.0

    @pytest.mark.parametrize("scheme", ["file", "FILE", "local"])
    def test_a_file_of_this_machine_is_one_by_whatever_url(self, operator, odd_images, table, scheme):
        expected = operator.compute_similarity(table.image[0], table.caption[0])
        assert expected > 0
        url = f"{scheme}://{Path(table.image[0]).absolute()}"
        assert not is_remote(url)
        assert operator.compute_similarity(url, table.caption[0]) == expected
        assert not is_remote(f"{scheme}://{odd_images}/pipe.jpg")  # nor is it waited for
        assert operator.compute_similarity(f"{scheme}://{odd_images}/pipe.jpg", "a caption") == 0.0

    @pytest.mark.parametrize("caption", [None, float("nan"), pd.NA, pd.NaT, "", " \n", ["a", "list"], {"a": "dict"}])
    def test_a_caption_that_is_none_scores_zero(self, operator, table, caption):
        assert operator.compute_similarity(table.image[0], caption) == 0.0

    def test_a_long_caption_is_truncated(self, operator, row_loop, table):
        caption = "a photo of many things " * 40
        score = row_loop.similarity(table.image[0], caption)
        assert operator.compute_similarity(table.image[0], caption) == pytest.approx(score, abs=1e-5)

    def test_a_number_is_a_caption(self, operator, row_loop, table):
        score = row_loop.similarity(table.image[0], "2024")
        assert operator.compute_similarity(table.image[0], np.int64(2024)) == pytest.approx(score, abs=1e-5)

    def test_half_a_surrogate_pair_is_replaced(self, operator, row_loop, table):
        score = row_loop.similarity(table.image[0], "a ? b")
        assert operator.compute_similarity(table.image[0], "a \ud800 b") == pytest.approx(score, abs=1e-5)

    def test_a_path_object_is_a_path(self, operator, table):
        image, caption = table.image[0], table.caption[0]
        assert operator.compute_similarity(Path(image), caption) == operator.compute_similarity(image, caption)

    def test_bad_rows_are_counted_and_logged_once_per_reason(self, operator, odd_images, table, caplog):
        names = ["truncated.jpg", "folder.jpg", "none.jpg", "bomb.png"] * 30
        rows = pd.DataFrame(
            {
                "image": [str(odd_images / name) for name in names] + [table.image[0], None, table.image[0]],
                "caption": ["a caption"] * len(names) + [None, "a caption", float("nan")],
            }
        )
        with caplog.at_level(logging.WARNING):
            _, kept = run_operator(operator, rows, threshold=0.01)
        assert list(kept.columns) == ["image", "caption"]
        assert not len(kept)
        messages = sorted(record.getMessage() for record in caplog.records if record.name.startswith("clipfilter_wds"))
        assert [message.partition(", the first")[0] for message in messages] == [
            "scored 0.0 of 123 pairs as blank_caption: 2",
            "scored 0.0 of 123 pairs as image_too_large: 30",
            "scored 0.0 of 123 pairs as missing_image: 1",
            "scored 0.0 of 123 pairs as unreadable_image: 90",
        ]
        assert "row 0 " in messages[3]
        assert "truncated.jpg" in messages[3]

    def test_single_pairs_are_logged_once_per_reason(self, clip_folder, odd_images, caplog):
        operator = ImageClipFilter(str(clip_folder), device="cpu")
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                operator.compute_similarity(str(odd_images / "folder.jpg"), "a caption")
        assert len([record for record in caplog.records if "unreadable_image" in record.getMessage()]) == 1

    def test_a_message_holds_no_password_and_no_encoded_image(self, clip_folder, caplog):
        operator = ImageClipFilter(str(clip_folder), device="cpu")
        secret = "http://me:hunter2@127.0.0.1:1/a.jpg?token=abc"
        with caplog.at_level(logging.WARNING):
            run_operator(operator, pd.DataFrame({"image": [secret], "caption": ["a"]}))
            operator.compute_similarity("iVBORw0KGgo" * 1_000_000, "a caption")
        first, second = (record.getMessage() for record in caplog.records)
        assert "(image 'http://127.0.0.1:1/a.jpg')" in first
        assert "image 'iVBORw0KGgo" in second
        assert len(second) < 400

    def test_an_odd_url_is_an_image_that_cannot_be_read(self, operator, table, tmp_path):
        odd = [f"simplecache::file://{tmp_path}/a.jpg", "filecache::https://127.0.0.1:1/a.jpg", "a::b://c/d.jpg"]
        rows = pd.DataFrame({"image": [table.image[0], *odd], "caption": ["a"] * 4})
        assert len(run_operator(operator, rows, threshold=0.0)[1]) == 4


class _Gathering(SimpleHTTPRequestHandler):
    """Answers nobody before so many have asked."""

    num_at_once = 8
    num_asked, gathered = count(1), threading.Event()

    def do_GET(self):
        if next(self.num_asked) >= self.num_at_once:
            self.gathered.set()
        self.gathered.wait(FOREVER)
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def http_folder(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Gathering, directory=str(tmp_path)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class TestImagesElsewhere:
    def test_images_are_fetched_over_http_many_at_a_time(self, operator, http_folder):
        folder, url = http_folder
        for seed in range(96):
            (folder / f"{seed}.jpg").write_bytes(encoded(photo(seed)))
        captions = [f"photo number {seed}" for seed in range(96)]
        local = pd.DataFrame({"image": [str(folder / f"{seed}.jpg") for seed in range(96)], "caption": captions})
        remote = pd.DataFrame({"image": [f"{url}/{seed}.jpg" for seed in range(96)], "caption": captions})
        remote.loc[len(remote)] = [f"{url}/none.jpg", "not found"]
        remote.loc[len(remote)] = ["http://127.0.0.1:1/refused.jpg", "nobody there"]
        _, kept = run_operator(operator, remote, threshold=0.01)
        expected = run_operator(operator, local, threshold=0.01)[1]
        assert 0 < len(expected) < len(local)
        assert [Path(image).name for image in kept.image] == [Path(image).name for image in expected.image]

    def test_images_are_read_through_fsspec(self, operator, tmp_path):
        (tmp_path / "a.jpg").write_bytes(encoded(photo(3)))
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            archive.write(tmp_path / "a.jpg", "inner/a.jpg")
        expected = operator.compute_similarity(str(tmp_path / "a.jpg"), "photo number 3")
        assert expected > 0
        assert operator.compute_similarity(f"file://{tmp_path}/a.jpg", "photo number 3") == expected
        assert operator.compute_similarity(f"zip://inner/a.jpg::{tmp_path}/images.zip", "photo number 3") == expected
        assert operator.compute_similarity(f"nothing-like-this://{tmp_path}/a.jpg", "photo number 3") == 0.0

    def test_relative_paths_begin_in_the_working_folder(self, operator, tmp_path, monkeypatch):
        (tmp_path / "a.jpg").write_bytes(encoded(photo(3)))
        monkeypatch.chdir(tmp_path)
        assert operator.compute_similarity("a.jpg", "photo number 3") > 0

    def test_a_storage_that_needs_a_package_is_an_error_that_names_it(self, operator):
        rows = pd.DataFrame({"image": ["gdrive://b/a.jpg"], "caption": ["a"]})
        with pytest.raises(ValueError, match=r"gdrive:// needs a package.*gdrive_?fs"):
            operator.run(Memory(rows))
