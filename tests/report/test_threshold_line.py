"""The line of a threshold in a real browser: wherever it is moved, the numbers are those of the tables."""

import shutil

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from clipfilter_wds.offline.config import RewriteConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.report.config import ReportConfig
from clipfilter_wds.report.run import write_report
from tests.report.browser import PHONE, Browser
from tests.report.conftest import THRESHOLD, Run
from tests.support.score_tables import derive


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


@pytest.mark.parametrize("typed", ["7", "-7", "", "-", "0.12345"])
def test_the_box_shows_what_is_taken_of_what_is_typed(browser, run, typed):
    browser.open()
    box = browser.find("threshold-number")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE, typed, Keys.TAB)
    browser.settle()
    assert float(box.get_attribute("value")) == browser.threshold()
    check_numbers(browser, run, browser.threshold())


@pytest.mark.slow
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
            assert all(card["kept"] for card in browser.cards("above-cards"))
        if kept < num_scored:
            assert not any(card["kept"] for card in browser.cards("below-cards"))
