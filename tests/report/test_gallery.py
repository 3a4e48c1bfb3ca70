"""The pairs that the page shows, in a real browser: near the threshold, at both ends, and those that are looked for."""

import numpy as np
import pytest
from selenium.webdriver.support.ui import WebDriverWait

from clipfilter_wds.report.config import ReportConfig
from clipfilter_wds.report.run import write_report
from clipfilter_wds.scores.subset import Subset
from tests.report.browser import DESKTOP, PHONE, PLACES
from tests.report.conftest import THRESHOLD, page_data
from tests.support.pace import FOREVER


def test_gallery_shows_pictures_around_the_threshold_and_at_both_ends(browser, run):
    browser.open()
    scores = run.all_scores()
    for threshold in (THRESHOLD, float(np.quantile(scores[scores > 0], 0.5).round(4))):
        browser.type_threshold(threshold)
        shown = {name: browser.cards(f"{name}-cards") for name in ("below", "above", "lowest", "highest")}
        assert all(len(cards) == 6 for cards in shown.values())
        assert all(card["width"] > 0 and card["alt"] for cards in shown.values() for card in cards)
        assert all(card["score"] < threshold and not card["kept"] for card in shown["below"])
        assert all(card["score"] >= threshold and card["kept"] for card in shown["above"])
    browser.find("reset").click()
    browser.settle()
    below, above = scores[scores < THRESHOLD], scores[scores >= THRESHOLD]
    assert browser.scores("below-cards") == pytest.approx(below[::-1][:6], abs=1e-4)
    assert browser.scores("above-cards") == pytest.approx(above[:6], abs=1e-4)
    assert browser.scores("lowest-cards") == pytest.approx(scores[:6], abs=1e-4)
    assert browser.scores("highest-cards") == pytest.approx(scores[::-1][:6], abs=1e-4)


@pytest.mark.parametrize("fewer", [True, False])
def test_no_sample_is_shown_twice(browser, fewer):
    browser.open()
    if not fewer:
        browser.find("more").click()
    shown = [card["origin"] for name in PLACES for card in browser.cards(f"{name}-cards")]
    assert len(shown) == len(set(shown)) > 24


def test_more_samples_are_offered_only_where_there_are_more(browser, run):
    page = run.report.with_name("few.html")
    write_report(ReportConfig(scores=run.output, output=page, threshold=1, thumbnails=6))
    browser.open(page="few.html")
    num_cards = sum(len(page_data(page)[cards]) for cards in ("cards", "unusable_cards"))
    assert sum(len(browser.lines(f"{name}-cards")) for name in PLACES) == num_cards > 6
    assert not browser.find("more").is_displayed()


def test_samples_are_found_by_outcome_and_text_and_their_keys_are_a_subset(browser, run, tmp_path):
    browser.open()
    browser.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    browser.select_outcome("below_threshold")
    cards = {name: browser.cards(f"{name}-cards") for name in PLACES}
    assert [name for name in PLACES if cards[name]] == ["below", "lowest"]
    assert not any(card["kept"] for card in cards["below"] + cards["lowest"])
    browser.find("text-filter").send_keys("PHOTO")
    cards = [card for name in PLACES for card in browser.cards(f"{name}-cards")]
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
    assert not browser.find("more").is_displayed()
    browser.open()
    for reason in ("blank_caption", "unreadable_image"):
        browser.select_outcome(reason)
        assert browser.cards("unusable-cards")
        assert not any(browser.cards(f"{name}-cards") for name in PLACES[:-1])


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_without_shards_samples_are_lines_of_a_table(browser, run, size):
    write_report(ReportConfig(scores=run.output, output=run.report.with_name("bare.html")))
    browser.open(size, page="bare.html")
    widths = "return [...document.querySelectorAll('.lines td')].map((cell) => [cell.scrollWidth, cell.offsetWidth])"
    assert all(content <= cell for content, cell in browser.run(widths))
    assert browser.run("return document.querySelectorAll('.frame').length") == 0
    lines = browser.lines("above-cards")
    above = run.all_scores()[run.all_scores() >= THRESHOLD][:6]
    assert [float(line[0].split()[0]) for line in lines] == pytest.approx(above, abs=1e-4)
