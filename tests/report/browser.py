"""Drives a report's page in a real browser."""

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

PHONE, DESKTOP = (390, 844), (1280, 900)
PLACES = ("below", "above", "lowest", "highest", "unusable")


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

    def select_outcome(self, outcome: str) -> None:
        Select(self.find("outcome-filter")).select_by_value(outcome)
        self.settle()

    def threshold(self) -> float:
        return float(self.find("threshold").get_attribute("aria-valuenow"))

    def drag(self, offset: int) -> None:
        grip = self.driver.find_element(By.CSS_SELECTOR, "#threshold .grip")
        ActionChains(self.driver).drag_and_drop_by_offset(grip, offset, 0).perform()
        self.settle()

    def press(self, *keys: str) -> None:
        """Press keys on the line of the chart."""
        self.run("document.getElementById('threshold').focus()")
        ActionChains(self.driver).send_keys(*keys).perform()
        self.settle()

    def bars(self) -> dict[str, int]:
        """How many samples the bars of the histogram stand for."""
        counts = self.run(
            """return ["kept", "dropped"].map((name) => [...document.querySelectorAll(`#scores rect.${name}`)].map(
              (bar) => Number(bar.dataset.count)))"""
        )
        assert all(number > 0 for numbers in counts for number in numbers)
        return dict(zip(("kept", "dropped"), map(sum, counts), strict=True))

    def outcomes(self) -> dict[str, int]:
        """The table of what becomes of the samples."""
        return {name: int(number.replace(",", "")) for name, number, *_ in self.lines("reasons")}

    def lines(self, name: str) -> list[list[str]]:
        """The cells of each line of a table's body."""
        return self.run(
            """return [...document.getElementById(arguments[0]).rows].map((row) =>
              [...row.cells].map((cell) => cell.innerText))""",
            name,
        )

    def scores(self, place: str) -> list[float]:
        return [card["score"] for card in self.cards(place)]

    def cards(self, place: str) -> list[dict]:
        """What the cards of a place show."""
        return self.run(
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
