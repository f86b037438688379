"""Chromium without a window for the tests of pages: one browser a session, no request of its own, its console kept."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

DEADLINE_S = 120
# Nothing here may ask anything of the network, so that what a page asks for is all that is seen.
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-dev-shm-usage",
)  # fmt: skip


def missing() -> str:
    """Return what of a browser is not here; empty where all is."""
    for name in ("chromium", "chromedriver"):
        if shutil.which(name) is None:
            return f"{name} is not installed (Debian: apt-get install chromium chromium-driver)"
    return ""


class Page:
    """The browser's one tab."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for option in (*OPTIONS, f"--user-data-dir={profile}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.driver.set_page_load_timeout(DEADLINE_S)
        self.driver.set_script_timeout(DEADLINE_S)

    def open(self, path: Path, width: int = 1400, dark: bool = False) -> None:
        """Open a file, its screen ``width`` px wide, and wait until its script is done."""
        self.requests(), self.messages()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(path.resolve().as_uri())

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, DEADLINE_S, 0.05).until(lambda driver: driver.execute_script(f"return {condition}"))

    def eval(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        return self.driver.execute_script(f"return {expression}")

    def messages(self) -> list[str]:
        """Return what the console said since the last call: errors of scripts, refused requests."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses that pages have asked for since the last call, other than ``data:`` ones.

        ``chrome:`` is the browser's own first tab, which may still be loading when a page is opened.
        """
        import json

        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "chrome:"))]


@pytest.fixture(scope="session")
def page():
    """The browser; a test that uses it is skipped by name where there is none."""
    if why := missing():
        pytest.skip(f"browser: {why}")
    pytest.importorskip("selenium", reason="browser: selenium is not installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        opened = Page(Path(profile))
        try:
            yield opened
        finally:
            opened.driver.quit()
