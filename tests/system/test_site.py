"""The documentation site, built and opened in a real browser."""

import json
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import pytest
from selenium.webdriver.remote.webdriver import WebDriver

from pictures.chromium import CHROMEDRIVER, CHROMIUM, HOW_TO_GET_IT, chromium

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", folder]
    subprocess.run(build, cwd=ROOT, check=True)
    return folder


@pytest.fixture
def address(site):
    """Of a server of this machine that has the site."""
    handler = partial(SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason=HOW_TO_GET_IT)
def test_no_page_asks_another_host_for_anything(site, address):
    pages = [page.relative_to(site) for page in site.rglob("*.html") if "files" not in page.relative_to(site).parts]
    assert len(pages) > 20
    with chromium() as driver:
        for page in pages:
            driver.get(f"{address}/{page}")
            driver.execute_async_script("setTimeout(arguments[0], 300)")  # for what scripts ask for
            urls = requests(driver)
            assert len(urls) > 1, page
            assert {url.hostname for url in urls if url.scheme.startswith("http")} == {"127.0.0.1"}, page


def requests(driver: WebDriver) -> list[SplitResult]:
    """What the browser has asked for since the last time, answered or not."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    return [urlsplit(params["request"]["url"]) for params in sent]
