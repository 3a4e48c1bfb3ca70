"""One filtered run, and the report of it."""

import functools
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from clipfilter_wds.offline.config import RewriteConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.report.config import ReportConfig
from clipfilter_wds.report.run import write_report
from clipfilter_wds.scores.selection import select
from clipfilter_wds.scores.table import ShardScores
from pictures.chromium import CHROMEDRIVER, CHROMIUM, HOW_TO_GET_IT, chromium
from tests.report.browser import Browser
from tests.support.pace import FOREVER
from tests.support.toys import pair, write_shard

THRESHOLD = 0.1237  # on a step of the slider's counts, and not of the slider
HOSTILE = "<script>alert(1)</script> </script><b>bold</b> \x1b[31mred\x1b[0m \u2028 &lt;tag&gt;"


@dataclass(frozen=True)
class Run:
    """The run's output, its input, and the report's path."""

    output: Path
    shards: Path
    report: Path

    @property
    def tables(self) -> list[ShardScores]:
        return [ShardScores.read(path) for path in sorted((self.output / "_scores").glob("*.parquet"))]

    def kept(self, threshold: float) -> int:
        """How many samples the product's own decision keeps."""
        return sum(select(table, threshold).stats.kept for table in self.tables)

    def all_scores(self) -> np.ndarray:
        """Of the samples that could be scored, lowest first."""
        return np.sort(np.concatenate([table.scores[table.usable] for table in self.tables]))


def page_data(path: Path) -> dict:
    """What the page's script reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())[1])


@pytest.fixture(scope="package")
def run(scorer, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("report")
    for shard in range(8):
        write_shard(folder / "shards" / f"{shard:05d}.tar", [_sample(shard, index) for index in range(40)])
    config = RewriteConfig(
        shards=f"{folder}/shards/*.tar", output=folder / "out", threshold=THRESHOLD, num_workers=0, batch_size=40
    )
    process_shards(config, scorer)
    run = Run(output=folder / "out", shards=folder / "shards", report=folder / "report.html")
    write_report(ReportConfig(scores=run.output, shards=f"{run.shards}/*.tar", output=run.report, thumbnails=200))
    return run


@pytest.fixture(scope="package")
def browser(run) -> Iterator[Browser]:
    """The page in a real browser."""
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip(HOW_TO_GET_IT)
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *_):
            requests.append(self.path)

        def end_headers(self):
            self.send_header("Cache-Control", "no-store")  # a page some minutes old would not be asked for again
            super().end_headers()

    serve = functools.partial(Handler, directory=run.report.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with chromium() as driver:
            driver.set_script_timeout(FOREVER)
            yield Browser(driver, f"http://127.0.0.1:{server.server_address[1]}/{run.report.name}", requests)
        server.shutdown()


def _sample(shard: int, index: int) -> dict[str, bytes]:
    """A pair; every fourth has a hostile caption, some are too long, and most of shard 5 can't be scored."""
    sample = pair(100 * shard + index, size=(60 + index, 50))
    if index % 4 == 0:
        sample["txt"] = f"{index} {HOSTILE}".encode()
    if index % 10 == 1:
        sample["txt"] = b"a caption that goes on and on " * 10
    if shard == 5 and index < 30:
        sample["txt" if index % 2 else "jpg"] = b" "
    return sample
