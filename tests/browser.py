"""A headless Chromium for tests, driven over its debugging protocol: open a page, wait for text,
click, take a picture."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,900",
    "--remote-debugging-port=0",
]


def chromium() -> str:
    """The browser, installed where that is possible; else the test is skipped."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        command = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
        subprocess.run(command, capture_output=True, timeout=300, check=False)
        found = shutil.which("chromium")
    if found is None:
        pytest.skip(
            "no chromium, and it cannot be installed here (apt-get install chromium, as root)"
        )
    return found


class Page:
    """The one tab of a browser. events: what it told beside its answers, of enabled domains."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._calls = 0
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": parameters})
        while True:
            answer = await self._socket.receive_json(timeout=30)
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    async def evaluate(self, expression: str) -> Any:
        return (await self.call("Runtime.evaluate", expression=expression, returnByValue=True))[
            "result"
        ].get("value")

    async def open(self, address: str) -> None:
        # an address that differs in its #fragment loads nothing
        await self.call("Page.navigate", url="about:blank")
        await self.call("Page.navigate", url=address)

    async def until(self, expression: str, seconds: float = 30.0) -> None:
        """Waits until the JavaScript expression is true; fails with the text of the page."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not await self.evaluate(f"Boolean({expression})"):
            text = await self.evaluate("document.body ? document.body.innerText : ''")
            assert asyncio.get_running_loop().time() < deadline, (
                f"{expression}\nnever true; the page says:\n{text}"
            )
            await asyncio.sleep(0.2)

    async def shows(self, *texts: str) -> None:
        for text in texts:
            await self.until(
                f"document.body && document.body.innerText.includes({json.dumps(text)})"
            )

    async def screenshot(self, path: Path) -> None:
        await asyncio.sleep(0.5)  # transitions
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


@contextlib.asynccontextmanager
async def browsing(profile: Path) -> AsyncIterator[Page]:
    """A browser with an empty profile, ended afterwards."""
    process = subprocess.Popen(
        [chromium(), *QUIET, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port_file = profile / "DevToolsActivePort"
        for _ in range(300):
            if port_file.exists() and port_file.read_text().strip():
                break
            assert process.poll() is None, "chromium ended"
            await asyncio.sleep(0.1)
        port = port_file.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
            async with session.ws_connect(
                tabs[0]["webSocketDebuggerUrl"], max_msg_size=1 << 28
            ) as socket:
                yield Page(socket)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


WIDTHS = (1280, 800, 390)
WIDE = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
UNEXPLAINED = "document.querySelectorAll('.grid thead th:not(:first-child):not([title])')"
DARK = "getComputedStyle(document.body).backgroundColor === 'rgb(20, 24, 29)'"


async def at_three_widths(page_file: Path, folder: Path, theme: str, *texts: str) -> None:
    """A page of compare, with these texts: it is as wide as the window, at 1280 so is every table;
    no errors, no request but for the file. Pictures are in the folder."""
    async with browsing(folder / "profile") as page:
        for domain in ("Runtime", "Log", "Network"):
            await page.call(f"{domain}.enable")
        feature = {"name": "prefers-color-scheme", "value": theme}
        await page.call("Emulation.setEmulatedMedia", features=[feature])
        for width in WIDTHS:
            shown = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            await page.call("Emulation.setDeviceMetricsOverride", **shown)
            await page.open(page_file.resolve().as_uri())
            await page.shows(*texts)
            assert await page.evaluate("document.documentElement.scrollWidth") <= width
            assert width < max(WIDTHS) or await page.evaluate(f"{WIDE}.length") == 0
            await page.screenshot(folder / f"report-{width}.png")
        assert await page.evaluate(f"{UNEXPLAINED}.length") == 0
        assert await page.evaluate(DARK) == (theme == "dark")
    told = [event["params"] for event in page.events]
    asked = [p["request"]["url"] for p in told if "request" in p]
    assert asked and all(url.startswith("file:") for url in asked)
    assert not [p for p in told if "entry" in p or "exceptionDetails" in p or "args" in p]
