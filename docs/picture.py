"""Photograph a report for the README: ``python docs/picture.py runs/eval/report.html docs/report.png``.

Needs selenium and chromium with its driver. The window is as wide as a README is read; the picture ends after the load.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

WIDTH, HEIGHT = 1280, 1500


def main(page: str, out: str) -> None:
    """Open the page, wait until its first plots are drawn, and save what is seen."""
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(flag)
    with webdriver.Chrome(options, Service(shutil.which("chromedriver"))) as driver:
        driver.set_page_load_timeout(60)
        driver.get(Path(page).resolve().as_uri())
        driver.implicitly_wait(30)
        driver.find_element("css selector", ".js-plotly-plot .main-svg")
        picture = Image.open(io.BytesIO(driver.get_screenshot_as_png()))
        picture.convert("RGB").quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
