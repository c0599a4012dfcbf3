"""The page in a real browser: no errors, the slider moves the frames, the heat map answers mouse and keyboard."""

from __future__ import annotations

import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium (apt-get install chromium)")

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def opened(page, tmp_path_factory):
    """The page in a fresh profile, the messages of its console, and what it asked the network for."""
    profile = tmp_path_factory.mktemp("profile")
    messages: list[str] = []
    requests: list[str] = []
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(profile), executable_path=CHROMIUM, args=ARGUMENTS, viewport={"width": 1200, "height": 900}
        )
        tab = context.new_page()
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("dialog", lambda dialog: (messages.append(f"dialog {dialog.message}"), dialog.dismiss()))
        tab.goto(page.as_uri())
        yield tab, messages, requests
        context.close()


def test_it_opens_without_errors_and_asks_for_nothing(opened, page):
    tab, messages, requests = opened
    assert tab.locator("h1").inner_text() == "Dense and sparse, from the same noise"
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]
    for picture in tab.locator("img").all():
        assert picture.evaluate("image => image.complete && image.naturalWidth > 0")


def test_the_slider_changes_the_frames(opened, comparison):
    tab, messages, _ = opened
    sources = {kind: tab.locator(f"#frame-{kind}").get_attribute("src") for kind in ("dense", "sparse", "difference")}
    tab.locator("#frame").focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    for kind, before in sources.items():
        assert tab.locator(f"#frame-{kind}").get_attribute("src") != before
    assert tab.locator("#frame-number").inner_text() == "2"
    assert f"{comparison.psnr_per_frame[2]:.1f} dB" in tab.locator("#frame-quality").inner_text()
    assert tab.locator("#frame-sparse").get_attribute("alt") == "Frame 2 of the sparse video"
    assert messages == []


def test_play_and_pause(opened):
    tab, messages, _ = opened
    before = tab.locator("#frame").input_value()
    tab.locator("#play").click()
    tab.wait_for_function("before => document.getElementById('frame').value !== before", arg=before)
    tab.locator("#play").click()
    assert tab.locator("#play").inner_text() == "Play"
    stopped = tab.locator("#frame").input_value()
    tab.wait_for_timeout(300)
    assert tab.locator("#frame").input_value() == stopped
    assert messages == []


def test_the_heat_map_tells_its_values(opened, comparison):
    tab, messages, _ = opened
    cell = tab.locator("#heat-steps tbody tr").nth(2).locator("td").nth(4)
    cell.scroll_into_view_if_needed()
    tip = tab.locator("#tip")
    assert not tip.is_visible()
    cell.hover()
    density = comparison.density.by_layer_and_step()[2][4]
    assert tip.is_visible() and tip.inner_text() == f"blocks.2.attn1, step 4: {density * 100:.1f} %"
    cell.focus()
    tab.keyboard.press("ArrowLeft")
    density = comparison.density.by_layer_and_step()[2][3]
    assert tip.inner_text() == f"blocks.2.attn1, step 3: {density * 100:.1f} %"
    tab.keyboard.press("Escape")
    assert not tip.is_visible()
    assert messages == []


def test_it_fits_a_phone(opened):
    tab, _, _ = opened
    tab.set_viewport_size({"width": 390, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
