import csv
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipfilter_wds.cli import main
from clipfilter_wds.tables.operator import ImageClipFilter
from tests.support.dataflow import RowLoop
from tests.support.pair_tables import NUM_ROWS
from tests.support.toys import Reference, encoded, photo

IMAGE_KINDS = {
    "jpg": lambda image: encoded(image, quality=90),
    "png": lambda image: encoded(image, "PNG"),
    "webp": lambda image: encoded(image, "WEBP"),
    "gif": lambda image: encoded(image, "GIF"),
    "alpha.png": lambda image: encoded(image.convert("RGBA"), "PNG"),
    "grey.jpg": lambda image: encoded(image.convert("L")),
}


@pytest.fixture
def call(capsys, clip_folder):
    """Run the command in this process: its exit code, stdout and stderr."""

    def run(*arguments: object, model: object = clip_folder, threshold: object = 0.25) -> tuple[int, str, str]:
        settings = ["--model", model, "--threshold", threshold, "--device", "cpu", "--precision", "fp32"]
        with pytest.raises(SystemExit) as raised:
            main([str(argument) for argument in ["table", *arguments, *settings]])
        captured = capsys.readouterr()
        return raised.value.code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, and the same table in each type; rows 3 and 4 can't be scored."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "images").mkdir()
    for seed in range(NUM_ROWS):
        (folder / "images" / f"{seed}.jpg").write_bytes(encoded(photo(seed)))
    records = [
        {"id": f"{seed:05d}", "image": f"images/{seed}.jpg", "caption": f"photo, “{seed}”", "n": seed, "x": seed / 3}
        for seed in range(NUM_ROWS)
    ]
    records[3]["image"] = "images/none.jpg"
    records[4]["caption"] = None
    lines = [json.dumps(record, ensure_ascii=seed % 2 == 0) for seed, record in enumerate(records)]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "pairs.json").write_text(json.dumps(records, indent=1))
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    table = pa.Table.from_pylist(records)
    table = table.set_column(0, "id", table["id"].dictionary_encode())
    pq.write_table(table.replace_schema_metadata({"who": "me"}), folder / "pairs.parquet", compression="zstd")
    return folder


@pytest.fixture(scope="module")
def expected(folder, clip_folder):
    """The reference's clipped score of every row."""
    reference = Reference(clip_folder)
    scores = []
    for record in json.loads((folder / "pairs.json").read_text()):
        path = folder / record["image"]
        usable = path.exists() and record["caption"]
        scores.append(reference.score(Image.open(path), record["caption"]) if usable else 0.0)
    return np.clip(scores, 0.0, 1.0)


@pytest.fixture(scope="module")
def threshold(expected):
    """One that splits the rows, and that no score is near."""
    scores = np.sort(expected)[20:80]
    widest = np.diff(scores).argmax()
    assert scores[widest + 1] - scores[widest] > 1e-4
    return float(scores[widest : widest + 2].mean())


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
