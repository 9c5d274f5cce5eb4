"""The report in a browser: it draws, reacts, stays within the window, and asks for nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from molora.eval.page.report import write_report
from tests.support import documents

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FC_LIST = shutil.which("fc-list")
CHROMEDRIVER = shutil.which("chromedriver") or shutil.which("/usr/bin/chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver (apt install chromium chromium-driver)"
    ),
]
PATIENCE_S = 20  # for a busy machine; what is waited for takes a fraction of a second

DRAWN = """return [...document.querySelectorAll('.chart')].filter(d => d.offsetParent !== null)
  .filter(d => !d.querySelector('svg.main-svg')).map(d => d.id)"""
CUT = """return [...document.querySelectorAll('h1, h2, h3, p, button, .card, .control, figcaption, .chart, dd')]
  .filter(e => e.offsetParent !== null && e.id !== 'tip')
  .filter(e => e.scrollWidth > e.clientWidth + 2 && getComputedStyle(e).display !== 'inline' ||
    e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(e => e.tagName + '#' + e.id + ' ' + e.textContent.slice(0, 40))"""
# A select may cut its entry, with an ellipsis and the whole text as its tooltip; it never leaves the window itself.
UNTOLD = """return [...document.querySelectorAll('select')].filter(e => e.offsetParent !== null).filter(e => {
  e.dispatchEvent(new Event('focusin', {bubbles: true}));
  return e.title !== e.selectedOptions[0].text || getComputedStyle(e).textOverflow !== 'ellipsis' ||
    e.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
}).map(e => e.id)"""
OVERLAPS = """const all = [...document.querySelectorAll('h1, h2, h3, .card, .control, figcaption, .chart')]
  .filter(e => e.offsetParent !== null).map(e => [e, e.getBoundingClientRect()]);
return all.flatMap(([a, p], i) => all.slice(i + 1).filter(([b, q]) => !a.contains(b) && !b.contains(a) &&
  p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1)
  .map(([b]) => a.textContent.slice(0, 30) + ' / ' + b.textContent.slice(0, 30)))"""


# Sans-serif fonts that browsers on Linux fall back to, from narrow to wide: the whole page is set in one of them alone.
FAMILIES = ("Liberation Sans", "DejaVu Sans")


def only_font(family: str, folder: Path) -> dict[str, str]:
    """The environment in which a program finds the fonts of one family and no others."""
    command = ["fc-list", "--format", "%{file}\n", family]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False) if FC_LIST else None
    if found is None or not found.stdout:
        pytest.skip(f"the font {family} is not installed (apt install fonts-liberation fonts-dejavu-core)")
    for path in map(Path, found.stdout.splitlines()):
        (folder / path.name).symlink_to(path)
    (folder / "fonts.conf").write_text(f"<fontconfig><dir>{folder}</dir><cachedir>{folder}</cachedir></fontconfig>")
    return {**os.environ, "FONTCONFIG_FILE": str(folder / "fonts.conf")}


@pytest.fixture(scope="session")
def browsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """A browser that knows one font family, started when it is first asked for."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    started: dict[str, Any] = {}

    def browser(family: str) -> Any:
        if family not in started:
            options = webdriver.ChromeOptions()
            for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
                options.add_argument(argument)
            options.binary_location = CHROMIUM
            options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
            service = Service(CHROMEDRIVER, env=only_font(family, tmp_path_factory.mktemp("fonts")))
            started[family] = webdriver.Chrome(options=options, service=service)
            started[family].set_page_load_timeout(60)
        return started[family]

    yield browser
    for driver in started.values():
        driver.quit()


@pytest.fixture
def driver(browsers: Callable[[str], Any]) -> Any:
    return browsers(FAMILIES[-1])


@pytest.fixture(scope="session")
def pages(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    folder, out = tmp_path_factory.mktemp("pages"), {}
    for recipe, base in (("mixlora", "llama"), ("mola", "llama"), ("mixlora", "t5")):
        document = documents.document(recipe, root, base=base)
        write_report([document], folder / f"{recipe}-{base}.html")
        out[f"{recipe}-{base}"] = folder / f"{recipe}-{base}.html", document
    first = out["mixlora-llama"][1]
    write_report([first, documents.document("mixlora", root, name="other", seed=3)], folder / "two.html")
    return {**out, "two": (folder / "two.html", first)}


def wait(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE_S
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    assert value
    return value


def visit(driver: Any, path: Path, width: int = 1280) -> None:
    for log in ("browser", "performance"):
        driver.get_log(log)
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(path.as_uri())
    driver.execute_script("document.querySelector('.chart').scrollIntoView({block: 'center'})")
    wait(lambda: driver.execute_script("return document.querySelector('svg.main-svg') !== null"))


def scroll_through(driver: Any) -> None:
    """Bring everything into view once, so that every chart is drawn."""
    for chart in driver.execute_script("return [...document.querySelectorAll('.chart')]"):
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
        time.sleep(0.02)
    wait(lambda: driver.execute_script(DRAWN) == [])


def fonts_in_use(driver: Any) -> set[str]:
    """Families that the page's text is drawn with, as the browser itself says."""
    for domain in ("DOM", "CSS"):
        driver.execute_cdp_cmd(f"{domain}.enable", {})
    page = driver.execute_cdp_cmd("DOM.getDocument", {})["root"]["nodeId"]
    heading = driver.execute_cdp_cmd("DOM.querySelector", {"nodeId": page, "selector": "h1"})["nodeId"]
    found = driver.execute_cdp_cmd("CSS.getPlatformFontsForNode", {"nodeId": heading})["fonts"]
    return {f["familyName"] for f in found}


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["mixlora-llama", "mola-llama", "mixlora-t5", "two"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_drawn_and_stays_within_the_window(
    browsers: Callable[[str], Any], pages: Any, family: str, name: str, width: int
):
    driver = browsers(family)
    visit(driver, pages[name][0], width)
    assert fonts_in_use(driver) == {family}
    scroll_through(driver)
    page = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    inside, window = driver.execute_script(page)
    assert inside <= window
    assert driver.execute_script(CUT) == []
    assert driver.execute_script(UNTOLD) == []
    assert driver.execute_script(OVERLAPS) == []
    assert [e for e in driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []


def test_nothing_is_loaded(driver: Any, pages: Any):
    visit(driver, pages["two"][0])
    scroll_through(driver)
    events = [json.loads(e["message"])["message"] for e in driver.get_log("performance")]
    urls = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert urls
    assert {u.partition(":")[0] for u in urls} <= {"file", "data", "blob"}
    assert [u for u in urls if u.startswith("file:")] == [pages["two"][0].as_uri()]


def test_the_selector_changes_the_heatmap(driver: Any, pages: Any):
    path, document = pages["mixlora-llama"]
    visit(driver, path)
    shown = "return document.getElementById('r0-load-map').data[0].z[0]"
    wait(lambda: driver.execute_script("return document.getElementById('r0-load-map').data"))
    for view, share in (
        ("all:", document["routing"]["load_of_all"]),
        ("domain:code", document["routing"]["load"]["code"]),
    ):
        driver.execute_script(
            "const s = document.getElementById('r0-load-view'); s.value = arguments[0];"
            "s.dispatchEvent(new Event('change'))", view)  # fmt: skip
        expected = [max(-2, min(2, math.log2(max(4 * x, 1e-6)))) for x in share[0]]
        wait(lambda e=expected: driver.execute_script(shown) == pytest.approx(e, abs=1e-3))


def test_pointer_and_keys_show_a_tokens_experts(driver: Any, pages: Any):
    from selenium.webdriver import ActionChains, Keys

    path, document = pages["mixlora-llama"]
    visit(driver, path)
    wait(lambda: driver.execute_script("return document.querySelectorAll('.token').length"))
    domain = driver.execute_script("return document.getElementById('r0-text-domain').value")
    sample = next(s for s in document["routing"]["samples"] if s["domain"] == domain)
    experts = [ids[0] for ids in sample["sites"][0]["experts"]]
    tokens = driver.execute_script("return [...document.querySelectorAll('.tokens')][0].querySelectorAll('.token')")
    assert [t.get_attribute("data-e") for t in tokens] == [str(e) for e in experts]
    tip = driver.find_element("id", "tip")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", tokens[2])
    ActionChains(driver).move_to_element(tokens[2]).perform()
    wait(lambda: tip.is_displayed() and f"expert {experts[2]}" in tip.text and "position 2" in tip.text)
    driver.execute_script("arguments[0].focus()", tokens[0])
    driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    wait(lambda: "position 1" in tip.text and f"expert {experts[1]}" in tip.text)
    assert tokens[1].get_attribute("aria-describedby") == "tip"
    driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    wait(lambda: not tip.is_displayed())


def test_a_tokens_experts_fit_a_narrow_window_however_many_they_are(driver: Any, pages: Any):
    visit(driver, pages["mixlora-llama"][0], width=400)
    token = wait(lambda: driver.execute_script("return document.querySelector('.token')"))
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", token)
    tip = driver.find_element("id", "tip")
    wait(tip.is_displayed)
    driver.execute_script("arguments[0].style.width = '200vw'", tip)  # a strip of as many layers as one likes
    width, window = driver.execute_script(
        "return [arguments[0].offsetWidth, document.documentElement.clientWidth]", tip
    )
    assert width + 16 <= window, "it keeps 8 pixels to each side, next to a scroll bar, too"
