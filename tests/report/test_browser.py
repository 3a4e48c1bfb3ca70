"""The report in a real browser: what a reader sees, and that nobody else hears of it."""

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from clipfilter_wds.offline.config import RewriteConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.report.config import ReportConfig
from clipfilter_wds.report.run import write_report
from tests.report.conftest import HOSTILE, THRESHOLD, Run
from tests.support.pace import FOREVER

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="no chromium and chromedriver: apt-get install chromium chromium-driver"
)

PHONE, DESKTOP = (390, 844), (1280, 900)


class Browser:
    """The page in headless Chromium, served by a local server that remembers what it is asked for."""

    def __init__(self, driver: webdriver.Chrome, url: str, requests: list[str]) -> None:
        self.driver, self.url, self.requests = driver, url, requests

    def open(self, size: tuple[int, int] = DESKTOP, *, dark: bool = False, page: str | None = None) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(self.url if page is None else f"{self.url.rpartition('/')[0]}/{page}")
        self.settle()

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        self.driver.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => setTimeout(done));")

    def find(self, name: str):
        return self.driver.find_element(By.ID, name)

    def run(self, script: str, *arguments: object):
        return self.driver.execute_script(script, *arguments)

    def number(self, name: str) -> int:
        return int(self.find(name).text.replace(",", ""))

    def type_threshold(self, threshold: float) -> None:
        box = self.find("threshold-number")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(f"{threshold:.4f}")
        self.settle()


@pytest.fixture(scope="module")
def browser(run) -> Iterator[Browser]:
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
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
        driver.set_script_timeout(FOREVER)
        try:
            yield Browser(driver, f"http://127.0.0.1:{server.server_address[1]}/{run.report.name}", requests)
        finally:
            driver.quit()
            server.shutdown()


def check_numbers(browser: Browser, run: Run, threshold: float) -> None:
    kept, seen = run.kept(threshold), sum(table.table.num_rows for table in run.tables)
    assert browser.number("kept") == kept
    assert browser.find("share").text == f"{100 * kept / seen:.1f}%"
    assert browser.number("seen") == seen
    assert browser.number("below") == len(run.all_scores()) - kept
    assert f"{kept} are at or above the threshold" in browser.find("scores").get_attribute("aria-label")
    assert f"below_threshold {len(run.all_scores()) - kept}" in browser.find("reasons").get_attribute("aria-label")
    bars = browser.run("return document.getElementById('scores').data.map(({name, y}) => [name, y])")
    assert {name: sum(y) for name, y in bars} == {"kept": kept, "dropped": len(run.all_scores()) - kept}


def test_numbers_follow_the_slider_the_keyboard_and_the_box(browser, run):
    browser.open()
    check_numbers(browser, run, THRESHOLD)
    assert not browser.find("reset").is_enabled()

    slider, seen = browser.find("threshold"), set()
    for offset in (-200, 60, -40):
        ActionChains(browser.driver).drag_and_drop_by_offset(slider, offset, 0).perform()
        browser.settle()
        threshold = float(slider.get_attribute("value"))
        check_numbers(browser, run, threshold)
        seen.add(threshold)
    assert len(seen) == 3

    slider.send_keys(Keys.HOME)
    browser.settle()
    check_numbers(browser, run, 0.0)
    slider.send_keys(Keys.ARROW_RIGHT * 5)
    browser.settle()
    assert float(browser.find("threshold-number").get_attribute("value")) == 0.005
    check_numbers(browser, run, 0.005)
    slider.send_keys(Keys.END)
    browser.settle()
    check_numbers(browser, run, float(slider.get_attribute("value")))

    scores = run.all_scores()
    for threshold in np.quantile(scores[scores > 0], [0.01, 0.3, 0.5, 0.8, 0.99]).round(4):
        browser.type_threshold(threshold)
        check_numbers(browser, run, threshold)

    browser.find("reset").click()
    browser.settle()
    check_numbers(browser, run, THRESHOLD)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_the_page_of_a_fraction_shows_what_the_run_kept(browser, run, tmp_path, fraction):
    config = RewriteConfig(
        shards=f"{run.shards}/*.tar", output=tmp_path, scores=run.output / "_scores", keep_fraction=fraction
    )
    kept, num_scored = process_shards(config).counts.kept, len(run.all_scores())
    page = run.report.with_name(f"{fraction}.html")
    write_report(ReportConfig(scores=config.scores, run=tmp_path, output=page))
    browser.open(page=page.name)
    for threshold in (None, 0.05):
        if threshold is not None:
            browser.type_threshold(threshold)
            check_numbers(browser, run, threshold)
            browser.find("reset").click()
            browser.settle()
        assert browser.number("kept") == kept
        assert browser.number("below") == num_scored - kept
        bars = browser.run("return document.getElementById('scores').data.map(({name, y}) => [name, y])")
        assert {name: sum(y) for name, y in bars} == {"kept": kept, "dropped": num_scored - kept}
        assert all(number >= 0 for _, y in bars for number in y)
        if kept:
            assert all(card["kept"] for card in _cards(browser, "above-cards"))
        if kept < num_scored:
            assert not any(card["kept"] for card in _cards(browser, "below-cards"))


def test_gallery_shows_pictures_around_the_threshold_and_at_both_ends(browser, run):
    browser.open()
    scores = run.all_scores()
    for threshold in (THRESHOLD, float(np.quantile(scores[scores > 0], 0.5).round(4))):
        browser.type_threshold(threshold)
        shown = {name: _cards(browser, f"{name}-cards") for name in ("below", "above", "lowest", "highest")}
        assert all(len(cards) == 6 for cards in shown.values())
        assert all(card["width"] > 0 and card["alt"] for cards in shown.values() for card in cards)
        assert all(card["score"] < threshold and not card["kept"] for card in shown["below"])
        assert all(card["score"] >= threshold and card["kept"] for card in shown["above"])
    browser.find("reset").click()
    browser.settle()
    below, above = scores[scores < THRESHOLD], scores[scores >= THRESHOLD]
    assert _scores(browser, "below-cards") == pytest.approx(below[::-1][:6], abs=1e-4)
    assert _scores(browser, "above-cards") == pytest.approx(above[:6], abs=1e-4)
    assert _scores(browser, "lowest-cards") == pytest.approx(scores[:6], abs=1e-4)
    assert _scores(browser, "highest-cards") == pytest.approx(scores[::-1][:6], abs=1e-4)


def _scores(browser: Browser, place: str) -> list[float]:
    return [card["score"] for card in _cards(browser, place)]


def _cards(browser: Browser, place: str) -> list[dict]:
    return browser.run(
        """return Promise.all([...document.getElementById(arguments[0]).children].map(async (card) => {
          const image = card.querySelector("img");
          await image?.decode();
          return {
            width: image?.naturalWidth, alt: image?.alt, kept: card.classList.contains("kept"),
            score: parseFloat(card.querySelector(".score").textContent),
            caption: card.querySelector(".caption").textContent, tags: card.querySelector(".caption").childElementCount,
          };
        }))""",
        place,
    )


def test_hostile_captions_are_text(browser):
    browser.open()
    browser.find("more").click()
    cards = [card for name in ("below", "above", "lowest", "highest") for card in _cards(browser, f"{name}-cards")]
    hostile = [card for card in cards if HOSTILE.replace("\x1b", "\u241b") in card["caption"]]
    assert hostile
    assert all(card["tags"] == 0 for card in hostile)
    assert browser.run("return document.querySelectorAll('script').length") == 3
    assert browser.run("return document.querySelectorAll('.cards b').length") == 0


def test_page_runs_no_foreign_script_and_asks_nobody_for_anything(browser):
    browser.driver.get_log("browser")
    browser.driver.get_log("performance")
    browser.requests.clear()
    browser.open()
    browser.find("more").click()
    browser.type_threshold(0.2)
    assert browser.driver.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = {
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    }
    assert browser.url in asked
    assert all(url == browser.url or url.startswith("data:image/jpeg;base64,") for url in asked)
    assert browser.requests == [f"/{browser.url.rpartition('/')[2]}"]

    # The policy holds against a script that got in all the same, and the browser would have told of it.
    browser.run(
        """const script = document.createElement("script"), image = new Image();
        script.textContent = "window.ran = true";
        image.src = "/stolen.png";
        document.body.append(script, image);"""
    )
    browser.settle()
    assert browser.run("return window.ran") is None
    assert browser.requests == [f"/{browser.url.rpartition('/')[2]}"]
    assert (
        len([entry for entry in browser.driver.get_log("browser") if "Content Security Policy" in entry["message"]])
        == 2
    )


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_fits_the_screen_and_follows_its_colours(browser, size, dark, tmp_path):
    browser.open(size, dark=dark)
    assert browser.run("const page = document.documentElement; return page.scrollWidth <= page.clientWidth")
    paper, plot = browser.run(
        """return [getComputedStyle(document.body).backgroundColor,
          getComputedStyle(document.querySelector("#scores .xtick text")).fill].map(
          (colour) => colour.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 765)"""
    )
    assert (paper < 0.2 and plot > 0.8) if dark else (paper > 0.8 and plot < 0.2)
    charts = browser.run(
        "return [...document.querySelectorAll('.chart')].map((chart) => chart.getAttribute('aria-label'))"
    )
    assert len(charts) == 4
    assert all(charts)
    browser.driver.save_screenshot(str(tmp_path / "report.png"))


def test_colours_change_with_the_system_and_outliers_are_marked(browser):
    browser.open()
    colour = "return getComputedStyle(document.querySelector('#tokens .xtick text')).fill"
    light = browser.run(colour)
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    WebDriverWait(browser.driver, FOREVER).until(lambda _: browser.run(colour) != light)
    marked = browser.run("return document.getElementById('shards').data.map(({name, text}) => [name, text])")
    assert dict(marked)["outlier"] == ["00005"]
    assert "1 of those drawn stand out" in browser.find("shards").get_attribute("aria-label")
