import io
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, UnidentifiedImageError

from clipfilter_wds.tables.file_storage import FileStorage
from clipfilter_wds.tables.operator import ImageClipFilter
from tests.support.pace import FOREVER
from tests.support.toys import Reference, encoded, make_clip, photo

DOCS = Path(__file__).parents[2] / "docs" / "dataflow.md"
IMAGE_KINDS = {
    "jpg": lambda image: encoded(image, quality=90),
    "png": lambda image: encoded(image, "PNG"),
    "webp": lambda image: encoded(image, "WEBP"),
    "gif": lambda image: encoded(image, "GIF"),
    "alpha.png": lambda image: encoded(image.convert("RGBA"), "PNG"),
    "grey.jpg": lambda image: encoded(image.convert("L")),
}


@dataclass
class Memory:
    """The least that is a storage."""

    table: pd.DataFrame
    written: list[pd.DataFrame] = field(default_factory=list)

    def read(self, output_type):
        assert output_type == "dataframe"
        return self.table

    def write(self, data):
        self.written.append(data)


class RowLoop:
    """The plain loop, one row at a time."""

    def __init__(self, folder: Path) -> None:
        self.reference = Reference(folder)

    def similarity(self, path: str, caption: str) -> float:
        try:
            image = Image.open(path).convert("RGB")
        except (FileNotFoundError, UnidentifiedImageError):
            return 0.0
        if not caption.strip():
            return 0.0
        return min(max(self.reference.score(image, caption), 0.0), 1.0)

    def run(self, table: pd.DataFrame, threshold: float) -> pd.DataFrame:
        scores = [self.similarity(row.image, row.caption) for row in table.itertuples()]
        return table[[score >= threshold for score in scores]].reset_index(drop=True)


@pytest.fixture(scope="module")
def operator(clip_folder):
    return ImageClipFilter(str(clip_folder), device="cpu")


@pytest.fixture(scope="module")
def row_loop(clip_folder):
    return RowLoop(clip_folder)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """More than two batches of pairs that the original handles."""
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for seed in range(150):
        kind = list(IMAGE_KINDS)[seed % len(IMAGE_KINDS)]
        path = folder / f"{seed}.{kind}"
        path.write_bytes(IMAGE_KINDS[kind](photo(seed, (40 + seed % 30, 50))))
        rows.append({"image": str(path), "caption": f"photo number {seed}", "n": seed, "nested": [seed, None]})
    rows[7]["image"] = str(folder / "there is none.jpg")
    rows[9]["caption"] = "  "
    (folder / "no image.jpg").write_text("no image")
    rows[140]["image"] = str(folder / "no image.jpg")
    return pd.DataFrame(rows)


def run(operator, table, **options):
    storage = Memory(table)
    returned = operator.run(storage, **options)
    (written,) = storage.written
    return returned, written


class TestTheSameAsTheRowLoop:
    def test_scores(self, operator, row_loop, table):
        expected = [row_loop.similarity(row.image, row.caption) for row in table.itertuples()]
        found = [operator.compute_similarity(row.image, row.caption) for row in table.itertuples()]
        assert np.abs(np.subtract(found, expected)).max() < 1e-5
        assert len(set(found)) > 20

    @pytest.mark.parametrize("quantile", [0.3, 0.7, 0.95])
    def test_rows_order_index_and_columns(self, operator, row_loop, table, quantile):
        scores = [row_loop.similarity(row.image, row.caption) for row in table.itertuples()]
        threshold = float(np.quantile([score for score in scores if score > 0], quantile)) + 1e-4
        returned, kept = run(operator, table, threshold=threshold)
        assert returned == ["image", "caption"]
        assert 0 < len(kept) < len(table)
        pd.testing.assert_frame_equal(kept, row_loop.run(table, threshold))

    def test_zero_keeps_what_could_not_be_scored(self, operator, table):
        _, kept = run(operator, table, threshold=0.0)
        pd.testing.assert_frame_equal(kept, table)

    def test_defaults(self, operator, row_loop, table):
        _, kept = run(operator, table)
        pd.testing.assert_frame_equal(kept, row_loop.run(table, 0.25))

    def test_is_consistent(self, operator, row_loop, table):
        image, caption = table.image[0], table.caption[0]
        score = row_loop.similarity(image, caption)
        assert operator.is_consistent(image, caption, score - 1e-4)
        assert not operator.is_consistent(image, caption, score + 1e-4)

    def test_the_description_is_chinese_or_english(self, operator):
        assert "CLIP" in operator.get_desc("en")
        assert "图" in operator.get_desc("zh") == operator.get_desc()


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
            _, kept = run(operator, rows, threshold=0.01)
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


class TestTables:
    def test_an_empty_table_keeps_its_columns_and_types(self, operator, table):
        _, kept = run(operator, table.iloc[:0])
        pd.testing.assert_frame_equal(kept, table.iloc[:0].reset_index(drop=True))

    def test_a_table_of_nothing_is_written_as_it_is(self, operator):
        _, kept = run(operator, pd.DataFrame())
        assert kept.empty

    def test_when_nothing_is_kept_the_columns_are(self, operator, table):
        _, kept = run(operator, table, threshold=1.0)
        assert not len(kept)
        assert list(kept.columns) == list(table.columns)
        assert list(kept.dtypes) == list(table.dtypes)

    @pytest.mark.parametrize("names", [("image path", "the caption"), ("class", "def"), ("_1", "a-b"), (0, 1)])
    def test_column_names_need_not_be_identifiers(self, operator, table, names):
        renamed = table.rename(columns={"image": names[0], "caption": names[1]})
        returned, kept = run(operator, renamed, input_image_key=names[0], input_caption_key=names[1], threshold=0.01)
        assert returned == list(names)
        expected = run(operator, table, threshold=0.01)[1]
        pd.testing.assert_frame_equal(kept, expected.rename(columns={"image": names[0], "caption": names[1]}))

    def test_duplicate_indexes_do_not_matter(self, operator, table):
        expected = run(operator, table, threshold=0.01)[1]
        assert 0 < len(expected) < len(table)
        pd.testing.assert_frame_equal(run(operator, table.set_axis([3] * len(table)), threshold=0.01)[1], expected)

    def test_a_missing_column_is_an_error_that_names_the_columns(self, operator, table):
        with pytest.raises(ValueError, match=r"input_caption_key is 'text', but .* 'image', 'caption', 'n', 'nested'"):
            operator.run(Memory(table), input_caption_key="text")
        with pytest.raises(ValueError, match="input_image_key is 'img'"):
            operator.run(Memory(table.iloc[:0]), input_image_key="img")

    def test_a_threshold_that_is_no_cosine_is_refused(self, operator, table):
        with pytest.raises(ValueError, match=r"Did you mean 0.25\?"):
            operator.run(Memory(table), threshold=25)

    def test_the_table_that_was_read_is_left_alone(self, operator, table):
        before = table.copy(deep=True)
        run(operator, table, threshold=0.01)
        pd.testing.assert_frame_equal(table, before)

    def test_steps_of_a_file_storage_follow_one_another(self, operator, table, tmp_path):
        table.to_parquet(tmp_path / "in.parquet")
        storage = FileStorage(str(tmp_path / "in.parquet"), cache_path=str(tmp_path / "cache"), cache_type="jsonl")
        operator.run(storage.step(), threshold=0.01)
        operator.run(storage.step(), threshold=0.02)
        first, second = (pd.read_json(tmp_path / "cache" / f"dataflow_cache_step{n}.jsonl", lines=True) for n in (1, 2))
        assert len(table) > len(first) > len(second) > 0
        assert list(second.columns) == list(table.columns)


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
        _, kept = run(operator, remote, threshold=0.01)
        expected = run(operator, local, threshold=0.01)[1]
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


def python(code: str, *, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, "-c", code], {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env, timeout=FOREVER)


class TestImports:
    def test_the_operator_needs_no_pandas_and_the_package_no_torch(self, tmp_path):
        code = (
            "import sys, clipfilter_wds\nassert 'torch' not in sys.modules\n"
            "from clipfilter_wds import ImageClipFilter\nassert 'pandas' not in sys.modules\n"
            "sys.modules['pandas'] = None\n"
            "from clipfilter_wds.tables.file_storage import FileStorage\nFileStorage('a.jsonl')"
        )
        done = python(code, cwd=tmp_path)
        assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError")
        assert "pip install 'clipfilter-wds[dataflow]'" in done.stderr.splitlines()[-1]

    def test_a_dataflow_that_does_not_work_is_said_and_no_hindrance(self, tmp_path):
        (tmp_path / "dataflow" / "utils").mkdir(parents=True)
        (tmp_path / "dataflow" / "utils" / "registry.py").write_text("import a_package_that_nobody_has")
        done = python("from clipfilter_wds import ImageClipFilter", cwd=tmp_path)
        assert done.returncode == 0
        assert "can't be used, so it does not know ImageClipFilter: No module named 'a_package" in done.stderr


def doc_example() -> str:
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "filt.run" in block
    ]
    return code


def test_the_documentation_example_runs_as_written(tmp_path):
    """A tiny CLIP takes the place of the hub's, and a table of two rows that of DataFlow's example."""
    make_clip(tmp_path / "openai" / "clip-vit-base-patch32")
    inputs = tmp_path / "dataflow" / "example" / "test_image_filter"
    inputs.mkdir(parents=True)
    (tmp_path / "1.png").write_bytes(encoded(photo(1), "PNG"))
    (inputs / "test_image_filter.jsonl").write_text(
        '{"image": "1.png", "caption": "A bride and groom smiling in a car."}\n'
        '{"image": "2.jpg", "caption": "A red bus driving across a snowy mountain road at night."}\n'
    )
    (tmp_path / "example.py").write_text(doc_example())
    done = subprocess.run(
        [sys.executable, "example.py"], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=FOREVER
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['image', 'caption']\n"
    assert "unreadable_image: 1" in done.stderr
    kept = (tmp_path / "cache_local" / "image_clip_filter_step1.jsonl").read_text()
    operator = ImageClipFilter(str(tmp_path / "openai" / "clip-vit-base-patch32"))
    score = operator.compute_similarity(str(tmp_path / "1.png"), "A bride and groom smiling in a car.")
    assert kept.count("\n") == (score >= 0.25)


DATAFLOW = """
import pandas as pd
from dataflow.core import OperatorABC
from dataflow.pipeline import PipelineABC
from dataflow.utils.registry import OPERATOR_REGISTRY
from dataflow.utils.storage import FileStorage
from clipfilter_wds import ImageClipFilter

assert OPERATOR_REGISTRY.get("ImageClipFilter") is ImageClipFilter
storage = FileStorage("in.jsonl", cache_path="./cache", file_name_prefix="direct", cache_type="jsonl")
operator = ImageClipFilter("clip", device="cpu")
assert isinstance(operator, OperatorABC)
assert operator.run(storage.step(), threshold=0.01) == ["image", "caption"]


class Pipeline(PipelineABC):
    def __init__(self):
        super().__init__()
        self.storage = FileStorage("in.jsonl", cache_path="./cache", file_name_prefix="pipeline", cache_type="jsonl")
        self.filter = operator

    def forward(self):
        self.filter.run(storage=self.storage.step(), input_image_key="image", threshold=0.01)


pipeline = Pipeline()
pipeline.compile()
pipeline.forward()
"""


@pytest.mark.slow
def test_it_works_with_dataflows_own_storage_registry_and_pipeline(clip_folder, table, tmp_path):
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    (site_packages,) = (environment / "lib").glob("python*/site-packages")
    # All that is installed here is found there too; DataFlow goes on top, without the hundred packages it names.
    (site_packages / "base.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    root = str(Path(__file__).parents[2])
    install = [environment / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", "open-dataflow", "colorlog"]
    subprocess.run(install, check=True, timeout=FOREVER)
    shutil.copytree(clip_folder, tmp_path / "clip")
    table.to_json(tmp_path / "in.jsonl", orient="records", lines=True)
    done = subprocess.run(
        [environment / "bin" / "python", "-c", DATAFLOW],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        timeout=FOREVER,
    )
    assert done.returncode == 0, done.stderr
    storage = FileStorage(str(tmp_path / "in.jsonl"), cache_path=str(tmp_path / "cache"), file_name_prefix="ours")
    ImageClipFilter(str(clip_folder), device="cpu").run(storage.step(), threshold=0.01)
    ours, direct, pipeline = (
        pd.read_json(io.StringIO((tmp_path / "cache" / f"{name}_step1.jsonl").read_text()), lines=True)
        for name in ("ours", "direct", "pipeline")
    )
    assert 0 < len(ours) < len(table)
    pd.testing.assert_frame_equal(direct, ours)
    pd.testing.assert_frame_equal(pipeline, ours)
