"""Starts headless Chromium."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from selenium import webdriver

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
#: What to do where they are missing.
HOW_TO_GET_IT = "no chromium and chromedriver: apt-get install chromium chromium-driver"


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser that keeps what its pages print and ask for in its logs ``browser`` and ``performance``."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    try:
        yield driver
    finally:
        driver.quit()
