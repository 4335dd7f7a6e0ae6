"""Chromium without a window, driven over WebDriver's protocol: pages opened from files."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
START_S = 20


class Browser:
    """A page in a window of some size."""

    def __init__(self, address, session):
        self._place = f"{address}/session/{session}"

    def open(self, path, width, height=900):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        parameters = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        call(f"{self._place}/goog/cdp/execute", parameters)
        call(f"{self._place}/url", {"url": path.resolve().as_uri()})

    def run(self, script):
        """Return what a function's body returns in the page."""
        return call(f"{self._place}/execute/sync", {"script": script, "args": []})

    def press(self, keys):
        """Press keys, one after the other, wherever the focus is."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        call(f"{self._place}/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def complaints(self):
        """Return what the console has been told."""
        return call(f"{self._place}/se/log", {"type": "browser"})

    def requests(self, page):
        """Return the addresses of all that a page has asked for."""
        entries = call(f"{self._place}/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        asked = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in asked if one.get("documentURL") == page.resolve().as_uri()]


@contextlib.contextmanager
def chromium(profile):
    """Start a browser with a profile of its own; skip the test if there is none."""
    driver, program = shutil.which("chromedriver"), shutil.which("chromium")
    if not (driver and program):
        pytest.skip("needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)")
    port = free_port()
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(address)
        options = {"binary": program, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        logging = {"browser": "ALL", "performance": "ALL"}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logging}
        session = call(f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        yield Browser(address, session)
        call(f"{address}/session/{session}", None, "DELETE")
    finally:
        process.terminate()
        process.wait()


def call(url, body, method="POST"):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as answer:
        return json.loads(answer.read())["value"]


def wait_until_ready(address):
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if call(f"{address}/status", None, "GET")["ready"]:
                return
        time.sleep(0.1)
    raise TimeoutError("chromedriver does not start")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
