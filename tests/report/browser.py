"""A headless Chromium, spoken to over a pipe in its own protocol: no driver and no package is needed."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


def found() -> str | None:
    """The browser of this machine: what TRIMTAB_BROWSER names, or the first that is on the path."""
    named = os.environ.get("TRIMTAB_BROWSER")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser, and everything it said or asked for since it was opened."""

    def __init__(self, binary: str, profile: Path) -> None:
        own_read, its_write = os.pipe()
        its_read, own_write = os.pipe()
        self.read, self.write = own_read, own_write

        def pipes() -> None:  # 3 is what it reads, 4 what it writes
            read, write = os.dup(its_read), os.dup(its_write)
            os.dup2(read, 3)
            os.dup2(write, 4)

        self.process = subprocess.Popen(
            [binary, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"],
            preexec_fn=pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_read)
        os.close(its_write)
        self.buffer, self.number, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = next(one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        about = {"targetId": target["targetId"], "flatten": True}
        self.session = self.call("Target.attachToTarget", about)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, parameters: dict[str, Any] | None = None, seconds: float = 60.0) -> dict[str, Any]:
        """Ask for something and wait for the answer; what else is said meanwhile is kept in `events`."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters or {}}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + seconds
        while True:
            answer = self.heard(until)
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def heard(self, until: float) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self.buffer:
            left = until - time.monotonic()
            assert left > 0, "the browser does not answer"
            assert select.select([self.read], [], [], left)[0], "the browser does not answer"
            more = os.read(self.read, 1 << 20)
            assert more, "the browser has ended"
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, page: Path, width: int = 1200, dark: bool = False, media: str = "screen") -> None:
        """Show a file at a width, in light or dark mode, and wait until it is there."""
        self.events = []
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
        self.call("Page.navigate", {"url": page.resolve().as_uri()})
        until = time.monotonic() + 60
        while not any(one.get("method") == "Page.loadEventFired" for one in self.events):
            self.events.append(self.heard(until))

    def run(self, script: str) -> Any:
        """The value of an expression on the page; what it throws fails."""
        found = self.call("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and uncaught exceptions."""
        loud = []
        for one in self.events:
            about = one.get("params", {})
            if one.get("method") == "Runtime.exceptionThrown":
                loud.append(json.dumps(about["exceptionDetails"]))
            elif one.get("method") == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
                loud.append(json.dumps(about["args"]))
            elif one.get("method") == "Log.entryAdded":
                loud.append(about["entry"]["text"])
        return loud

    @property
    def requested(self) -> list[str]:
        """Addresses the page asked for, itself left out."""
        asked = [one["params"]["request"]["url"] for one in self.events if one.get("method", "") == REQUEST]
        return [url for url in asked if not url.startswith("data:")][1:]

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.read)
        os.close(self.write)


REQUEST = "Network.requestWillBeSent"
