"""The report in a real browser: what a reader sees, and that nobody else hears of it."""

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from clipfilter_wds.offline.config import RewriteConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.report.config import ReportConfig
from clipfilter_wds.report.run import write_report
from clipfilter_wds.scores.selection import select
from clipfilter_wds.scores.subset import Subset
from clipfilter_wds.scores.table import ShardScores
from pictures.chromium import CHROMEDRIVER, CHROMIUM, HOW_TO_GET_IT, chromium
from tests.report.browser import DESKTOP, PHONE, Browser
from tests.report.conftest import HOSTILE, THRESHOLD, Run
from tests.support.pace import FOREVER
from tests.support.score_tables import derive, written

pytestmark = pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason=HOW_TO_GET_IT)

PLACES = ("below", "above", "lowest", "highest", "unusable")


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
        with chromium() as driver:
            driver.set_script_timeout(FOREVER)
            yield Browser(driver, f"http://127.0.0.1:{server.server_address[1]}/{run.report.name}", requests)
        server.shutdown()


def check_numbers(browser: Browser, run: Run, threshold: float) -> None:
    kept, seen = run.kept(threshold), sum(table.table.num_rows for table in run.tables)
    assert browser.number("kept") == kept
    assert float(browser.find("share").text.removesuffix("%")) == pytest.approx(100 * kept / seen, abs=0.0501)
    assert browser.number("seen") == seen
    assert browser.number("below") == len(run.all_scores()) - kept
    assert f"{kept} are at or above the threshold" in browser.find("scores").get_attribute("aria-label")
    outcomes = browser.outcomes()
    assert (outcomes["kept"], outcomes["below_threshold"]) == (kept, len(run.all_scores()) - kept)
    assert sum(outcomes.values()) == seen
    assert browser.bars() == {"kept": kept, "dropped": len(run.all_scores()) - kept}


def test_numbers_follow_the_line_wherever_it_is_dragged(browser, run):
    browser.open()
    check_numbers(browser, run, THRESHOLD)
    assert not browser.find("reset").is_enabled()
    seen = set()
    for offset in (-200, 60, -40):
        browser.drag(offset)
        check_numbers(browser, run, browser.threshold())
        seen.add(browser.threshold())
    assert len(seen) == 3
    left = browser.run("return document.querySelector('#threshold .grip').getBoundingClientRect().left")
    browser.drag(round(100 - left))  # beyond 0, to where scores are negative
    assert browser.threshold() == 0.0
    check_numbers(browser, run, 0.0)

    chart = browser.find("scores")
    ActionChains(browser.driver).move_to_element_with_offset(chart, 200, 0).click().perform()
    browser.settle()
    assert browser.threshold() > 0.05
    check_numbers(browser, run, browser.threshold())
    browser.find("reset").click()
    browser.settle()
    check_numbers(browser, run, THRESHOLD)


def test_a_finger_drags_the_line_on_a_phone(browser, run):
    browser.open(PHONE)
    left, top = browser.run(
        "const {left, top} = document.querySelector('#threshold .grip').getBoundingClientRect(); return [left, top]"
    )

    def touch(kind: str, *points: dict) -> None:
        browser.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(points)})

    touch("touchStart", {"x": left + 8, "y": top + 15})
    for moved in (10, 30, 60):
        touch("touchMove", {"x": left + 8 - moved, "y": top + 15})
    touch("touchEnd")
    browser.settle()
    assert browser.threshold() < THRESHOLD - 0.02
    check_numbers(browser, run, browser.threshold())


def test_numbers_follow_the_keyboard(browser, run):
    browser.open()
    browser.press(Keys.HOME)
    check_numbers(browser, run, 0.0)
    browser.press(Keys.ARROW_RIGHT * 5, Keys.ARROW_DOWN, Keys.ARROW_UP)
    assert float(browser.find("threshold-number").get_attribute("value")) == browser.threshold() == 0.005
    check_numbers(browser, run, 0.005)
    browser.press(Keys.PAGE_UP, Keys.PAGE_UP, Keys.PAGE_DOWN, Keys.ARROW_LEFT)
    assert browser.threshold() == 0.014
    browser.press(Keys.END)
    assert browser.threshold() > run.all_scores().max()
    check_numbers(browser, run, browser.threshold())


def test_numbers_are_those_of_the_tables_at_twenty_thresholds(browser, run):
    browser.open()
    scores = run.all_scores()
    for threshold in np.quantile(scores[scores > 0], np.linspace(0.01, 0.99, 20)).round(4):
        browser.type_threshold(threshold)
        check_numbers(browser, run, threshold)


def test_the_log_scale_shows_few_samples_beside_many_and_changes_no_count(browser, run):
    browser.open()
    lowest = (
        "return Math.min(...[...document.querySelectorAll('#scores rect.kept')].map((bar) => bar.height.baseVal.value))"
    )
    evenly = browser.run(lowest)
    browser.find("log").click()
    browser.settle()
    assert browser.run(lowest) > evenly
    check_numbers(browser, run, THRESHOLD)


@pytest.mark.parametrize("scale", [0.001, 30.0])
def test_the_line_goes_over_the_range_of_scores_that_are_no_cosines(browser, run, tmp_path, scale):
    folder = shutil.copytree(run.output / "_scores", tmp_path / "scores")
    derive(folder, "loss", lambda cosines: np.float32(scale) * (cosines - np.float32(0.5)))
    write_report(ReportConfig(scores=folder, output=run.report.with_name("loss.html")))
    scores = np.float32(scale) * (run.all_scores() - np.float32(0.5))
    browser.open(page="loss.html")
    seen = set()
    for offset in (0, -150, 40, -200):
        browser.drag(offset)
        kept = int((scores.astype(np.float64) >= browser.threshold()).sum())
        assert browser.number("kept") == kept
        assert browser.bars() == {"kept": kept, "dropped": len(scores) - kept}
        seen.add(kept)
    assert len(seen) == 4
    browser.press(Keys.HOME)
    assert browser.number("kept") == len(scores)
    browser.press(Keys.END)
    assert browser.number("kept") == 0


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
        assert browser.bars() == {"kept": kept, "dropped": num_scored - kept}
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
            caption: card.querySelector(".caption")?.textContent,
            tags: card.querySelector(".caption")?.childElementCount,
            origin: (card.querySelector(".origin") ?? card.cells[1]).textContent,
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
    assert browser.run("return document.querySelectorAll('script').length") == 2
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
          getComputedStyle(document.querySelector("#scores .tick")).fill].map(
          (colour) => colour.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 765)"""
    )
    assert (paper < 0.2 and plot > 0.8) if dark else (paper > 0.8 and plot < 0.2)
    charts = browser.run(
        "return [...document.querySelectorAll('.chart')].map((chart) => chart.getAttribute('aria-label'))"
    )
    assert len(charts) == 3
    assert all(charts)
    browser.driver.save_screenshot(str(tmp_path / "report.png"))


def test_colours_change_with_the_system_and_outliers_are_marked(browser):
    browser.open()
    colour = "return getComputedStyle(document.querySelector('#tokens .tick')).fill"
    light = browser.run(colour)
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    WebDriverWait(browser.driver, FOREVER).until(lambda _: browser.run(colour) != light)
    assert browser.run(
        "return [...document.querySelectorAll('#shards .outlier title')].map((title) => title.textContent)"
    )[0].startswith("00005")
    assert "1 of those drawn stand out" in browser.find("shards").get_attribute("aria-label")


def test_shards_are_compared_by_any_of_their_numbers(browser, run):
    browser.open()
    shown = browser.lines("shard-lines")
    assert len(shown) == 8
    assert shown[0][0] == "00005 outlier"
    assert [line[1:4] for line in sorted(shown)] == [
        [str(table.table.num_rows), str(int((~table.usable).sum())), str(select(table, THRESHOLD).stats.kept)]
        for table in run.tables
    ]
    medians = {f"{np.median(table.scores[table.usable]):.4f}" for table in run.tables}
    for direction in (-1, 1):
        browser.driver.find_element(By.CSS_SELECTOR, "[data-order=median]").click()
        found = [line[5] for line in browser.lines("shard-lines")]
        assert set(found) == medians
        assert found == sorted(found, key=float)[::direction]


@pytest.mark.parametrize("fewer", [True, False])
def test_no_sample_is_shown_twice(browser, fewer):
    browser.open()
    if not fewer:
        browser.find("more").click()
    shown = [card["origin"] for name in PLACES for card in _cards(browser, f"{name}-cards")]
    assert len(shown) == len(set(shown)) > 24


def test_samples_are_found_by_outcome_and_text_and_their_keys_are_a_subset(browser, run, tmp_path):
    browser.open()
    browser.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    browser.select_outcome("below_threshold")
    cards = {name: _cards(browser, f"{name}-cards") for name in PLACES}
    assert [name for name in PLACES if cards[name]] == ["below", "lowest"]
    assert not any(card["kept"] for card in cards["below"] + cards["lowest"])
    browser.find("text-filter").send_keys("PHOTO")
    cards = [card for name in PLACES for card in _cards(browser, f"{name}-cards")]
    assert cards
    assert all("photo" in card["caption"].lower() for card in cards)
    browser.find("save").click()
    WebDriverWait(browser.driver, FOREVER).until(lambda _: (tmp_path / "keys.txt").exists())
    subset, keys = Subset(tmp_path / "keys.txt"), [card["origin"].split(" in ")[0] for card in cards]
    assert subset.holds(keys, [None] * len(keys)).all()
    assert len((tmp_path / "keys.txt").read_text().splitlines()) == len(keys)

    browser.find("text-filter").send_keys("no caption has this")
    assert browser.find("none").is_displayed()
    assert not browser.find("save").is_enabled()
    browser.open()
    for reason in ("blank_caption", "unreadable_image"):
        browser.select_outcome(reason)
        assert _cards(browser, "unusable-cards")
        assert not any(_cards(browser, f"{name}-cards") for name in PLACES[:-1])


def test_without_shards_samples_are_lines_of_a_table(browser, run):
    write_report(ReportConfig(scores=run.output, output=run.report.with_name("bare.html")))
    browser.open(page="bare.html")
    assert browser.run("return document.querySelectorAll('.frame').length") == 0
    lines = browser.lines("above-cards")
    above = run.all_scores()[run.all_scores() >= THRESHOLD][:6]
    assert [float(line[0].split()[0]) for line in lines] == pytest.approx(above, abs=1e-4)


@pytest.mark.parametrize("kind", [None, "loss"], ids=["cosines", "loss"])
@pytest.mark.parametrize("num_samples", [0, 1])
def test_pages_of_hardly_any_sample_are_drawn(browser, run, tmp_path, num_samples, kind):
    table = run.tables[0]
    few = ShardScores(
        table=table.table.slice(0, num_samples), metadata=replace(table.metadata, num_samples=num_samples)
    )
    (tmp_path / "few.parquet").write_bytes(written(few))
    if kind is not None:
        derive(tmp_path, kind, np.negative)
    write_report(ReportConfig(scores=tmp_path, output=run.report.with_name("few.html")))
    browser.driver.get_log("browser")
    browser.open(page="few.html")
    assert browser.number("seen") == num_samples
    browser.press(Keys.END)
    browser.press(Keys.HOME)
    assert browser.number("kept") == few.usable.sum()
    assert browser.driver.get_log("browser") == []
    assert "e" not in browser.find("threshold").get_attribute("aria-valuemin")


@pytest.mark.parametrize("page", ["report.html", "compared.html"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_serious(browser, run, dark, page):
    axe = pytest.importorskip("axe_playwright_python", reason="no axe-core: pip install axe-playwright-python")
    if page == "compared.html":
        config = ReportConfig(scores=run.output, output=run.report.with_name(page), compare=run.output / "_scores")
        write_report(config)
    for size in (PHONE, DESKTOP):
        browser.open(size, dark=dark, page=page)
        browser.run((Path(axe.__file__).parent / "axe.min.js").read_text())
        found = browser.driver.execute_async_script("axe.run().then(arguments[0])")
        assert len(found["passes"]) > 20
        assert [broken for broken in found["violations"] if broken["impact"] in ("serious", "critical")] == []
