"""The report in a real browser: what a reader sees, and that nobody else hears of it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from clipfilter_wds.report.config import ReportConfig
from clipfilter_wds.report.run import write_report
from clipfilter_wds.scores.selection import select
from clipfilter_wds.scores.table import ShardScores
from tests.report.browser import DESKTOP, PHONE
from tests.report.conftest import HOSTILE, THRESHOLD
from tests.support.pace import FOREVER
from tests.support.score_tables import derive, written


def test_hostile_captions_are_text(browser):
    browser.open()
    browser.find("more").click()
    cards = [card for name in ("below", "above", "lowest", "highest") for card in browser.cards(f"{name}-cards")]
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
    assert browser.driver.title == f"Scores of {num_samples} sample{'' if num_samples == 1 else 's'}"
    widths = browser.run("return [...document.querySelectorAll('[data-count]')].map((bar) => bar.getBBox().width)")
    assert len(widths) == few.usable.sum()
    assert all(width > 2 for width in widths)
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
