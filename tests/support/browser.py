"""Chromium without a window, for the tests of pages; nothing outside of the file is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
DRIVER = shutil.which("chromedriver")
MISSING = "needs chromium and chromedriver on the path (Debian: chromium chromium-driver)"

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def start(profile: Path, page: Path, downloads: Path | None = None) -> Any:
    """A browser that shows ``page``, 1280 pixels wide; its logs begin with that page."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    if downloads is not None:
        kept = {"download.default_directory": str(downloads), "download.prompt_for_download": False}
        options.add_experimental_option("prefs", kept)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    driver.set_window_size(1280, 900)
    driver.get("about:blank")
    driver.get_log("performance")  # what the browser's own first page asked for
    driver.get(page.as_uri())
    return driver


@contextmanager
def width(browser: Any, pixels: int) -> Iterator[None]:
    """A window ``pixels`` wide; a narrow one is a phone's, as windows end at 500 pixels."""
    size = {"width": pixels, "height": 800, "deviceScaleFactor": 1, "mobile": pixels < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@contextmanager
def scheme(browser: Any, name: str) -> Iterator[None]:
    """``light`` or ``dark``."""
    feature = {"features": [{"name": "prefers-color-scheme", "value": name}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def too_wide(browser: Any) -> bool:
    """Whether the page is wider than its window."""
    root = "document.documentElement"
    return bool(browser.execute_script(f"return {root}.scrollWidth > {root}.clientWidth"))


def asked_for(browser: Any) -> set[str]:
    """Addresses that were asked for since the log was read last, but for data in the page."""
    asked = [
        message["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        for message in [json.loads(entry["message"])["message"]]
        if message["method"] == "Network.requestWillBeSent"
    ]
    return {url for url in asked if not url.startswith("data:")}
