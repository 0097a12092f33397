"""A real browser for the pages of the project: Chromium without a window, driven through its DevTools pipe.

    with Browser.started() as browser:
        page = browser.opened(path, width=400)
        page.complaints      # lines of the console, exceptions and requests: expected none
        page.too_wide()      # elements that are wider than the page: expected none

Screenshots are written to $IMP_SCREENSHOTS, if that is set.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Seconds that an answer may take on a loaded machine.
_PATIENCE_S = 200.0
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
_QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio")
# Elements that reach beyond the right edge of the page, those in a box that scrolls or cuts them included.
_TOO_WIDE = """(() => {
  const limit = document.documentElement.clientWidth + 0.5;
  return [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > limit)
    .map(e => `${e.tagName} ${e.id || e.className} ${Math.round(e.getBoundingClientRect().right)}`).slice(0, 10);
})()"""


def find_browser() -> str:
    """The path of Chromium. Skips the test on a machine without it."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    return found


class Browser:
    """Messages to a browser process and its answers. Use ``started``."""

    def __init__(self, process: subprocess.Popen, to: int, back: int) -> None:
        self._process, self._to, self._back = process, to, back
        self._numbers = itertools.count(1)
        self._bytes = b""

    @classmethod
    @contextlib.contextmanager
    def started(cls) -> Iterator[Browser]:
        """A browser of its own, with an empty profile, ended after the block."""
        path = find_browser()
        to_child, to = os.pipe()
        back, from_child = os.pipe()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            flags = (*_FLAGS, *_QUIET, f"--user-data-dir={profile}", "--remote-debugging-pipe")
            # Chromium reads file descriptor 3 and writes 4; moved through high numbers, as either may be taken.
            command = f'exec 13<&{to_child} 14>&{from_child}; exec 3<&13 4>&14 13<&- 14>&-; exec "$0" "$@"'
            process = subprocess.Popen(
                ["bash", "-c", command, path, *flags, "about:blank"],
                pass_fds=(to_child, from_child),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Sockets have short names.
                env=os.environ | {"TMPDIR": "/tmp"},
            )
            os.close(to_child)
            os.close(from_child)
            try:
                yield cls(process, to, back)
            finally:
                process.kill()
                process.wait()
                os.close(to)
                os.close(back)

    def opened(self, path: Path, *, width: int = 1280, height: int = 800) -> Page:
        """A file, loaded in a page of this width in CSS pixels. Below 600 it is a phone."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, width)
        page.resize(width, height)
        page.load(path)
        return page

    def ask(self, method: str, *, session: str | None = None, events: list | None = None, **parameters: Any) -> dict:
        """The answer to one message; events that come before it are added to ``events``."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        os.write(self._to, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            found = self.receive()
            if found.get("id") == number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]
            if events is not None:
                events.append(found)

    def receive(self) -> dict:
        """The next message of the browser."""
        until = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._bytes:
            if not select.select([self._back], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"the browser gave no answer in {_PATIENCE_S:.0f} s")
            more = os.read(self._back, 1 << 20)
            if not more:
                raise RuntimeError("the browser has ended")
            self._bytes += more
        first, _, self._bytes = self._bytes.partition(b"\0")
        return json.loads(first)


class Page:
    """One open page."""

    def __init__(self, browser: Browser, session: str, width: int) -> None:
        self._browser, self._session, self._width = browser, session, width
        self._events: list[dict] = []
        self._url = ""

    def ask(self, method: str, **parameters: Any) -> dict:
        return self._browser.ask(method, session=self._session, events=self._events, **parameters)

    def resize(self, width: int, height: int) -> None:
        mobile = width < 600
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def load(self, path: Path) -> None:
        """Opens a file and waits until all of it is loaded."""
        self._url = path.resolve().as_uri()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Page.navigate", url=self._url)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._browser.receive())

    def run(self, script: str) -> Any:
        """The value of an expression, after its promise."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Presses a key by its name, such as Tab, Enter or ArrowRight."""
        code = {"Tab": 9, "Enter": 13, "ArrowRight": 39, "ArrowLeft": 37}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            more = text if kind == "keyDown" else {}
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    @property
    def complaints(self) -> list[str]:
        """Exceptions, errors and warnings of the console, and requests for anything but the page itself."""
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))")
        return [line for line in map(self._complaint, self._events) if line]

    def _complaint(self, event: dict) -> str | None:
        method, values = event["method"], event.get("params", {})
        if method == "Runtime.exceptionThrown":
            return f"exception: {values['exceptionDetails']}"
        if method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            return f"console: {values['args']}"
        if method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            return f"log: {values['entry']['text']}"
        url = values.get("request", {}).get("url", "") if method == "Network.requestWillBeSent" else ""
        own = not url or url == self._url or url.startswith(("data:", "blob:"))
        return None if own else f"request: {url[:200]}"

    def too_wide(self) -> list[str]:
        """The elements that reach beyond the page's right edge, and the page if it can be scrolled sideways."""
        found = self.run(_TOO_WIDE)
        wide = self.run("document.documentElement.scrollWidth")
        return found + ([f"the page is {wide} wide"] if wide > self._width else [])

    def screenshot(self, name: str, *, whole: bool = True, folder: Path | None = None) -> None:
        """NAME.png of the page, all of its length by default, in a folder or $IMP_SCREENSHOTS."""
        target = folder or os.environ.get("IMP_SCREENSHOTS")
        if not target:
            return
        Path(target).mkdir(parents=True, exist_ok=True)
        data = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        (Path(target) / f"{name}.png").write_bytes(base64.b64decode(data))

    def print_pdf(self, path: Path) -> None:
        """The page as it is printed on A4."""
        path.write_bytes(base64.b64decode(self.ask("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"]))
