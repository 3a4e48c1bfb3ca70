"""Takes a picture of the demo's report, as a browser shows it."""

import base64
import io
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from pictures.chromium import CHROMEDRIVER, CHROMIUM, HOW_TO_GET_IT, chromium

#: The part of the page that is shown, in CSS pixels, and how many of the screen's each of them has.
WIDTH, HEIGHT, SCALE = 1280, 1120, 2
NUM_COLOURS = 256


def write_report_picture(picture: Path) -> None:
    """Run the demo, open its report, and write its upper part as a PNG."""
    if not (CHROMIUM and CHROMEDRIVER):
        raise SystemExit(f"the picture of the report takes a browser; there is {HOW_TO_GET_IT}")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "clipfilter_wds", "demo", "--quiet"], cwd=folder, check=True)
        shot = photograph(Path(folder, "clipfilter_demo", "report.html"))
    # Without k-means the few pixels that are yellow become orange.
    shot.quantize(NUM_COLOURS, kmeans=4, dither=Image.Dither.NONE).save(picture, optimize=True)


def photograph(page: Path) -> Image.Image:
    """The upper part of a page, in light colours."""
    with chromium() as driver:
        light = {"name": "prefers-color-scheme", "value": "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [light]})
        metrics = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": SCALE, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
        driver.get(page.as_uri())
        driver.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => setTimeout(done, 500));")
        png = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    return Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
