"""A headless Chromium to look at pages with: real keys, any width, light or dark, and a list of what went wrong.

    with Browser(path) as page:
        page.size(390, 844)
        page.key("ArrowRight")
        page.run("document.title")
        page.errors, page.requests

Speaks the DevTools protocol through a pair of pipes (--remote-debugging-pipe), which needs no library.
"""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9, " ": 32}


class Browser:
    """One page in a browser of its own."""

    def __init__(self, path, seconds=30):
        self.address, self.seconds = Path(path).resolve().as_uri(), seconds
        self.errors, self.requests = [], []
        self._number, self._rest, self._answers, self._loaded = 0, b"", {}, False

    def __enter__(self):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        high = [os.dup(fd) for fd in (theirs_in, theirs_out)]  # not 3 or 4 themselves, which dup2 overwrites
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)

        def pipes():
            spare = [os.dup(fd) for fd in high]
            os.dup2(spare[0], 3)
            os.dup2(spare[1], 4)

        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
        ]
        self._process = subprocess.Popen(
            [CHROMIUM, *arguments, f"--user-data-dir={self._folder.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=pipes,
        )
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self._in, self._out, self._session = ours_in, ours_out, None
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.size(1280, 900)
        self.send("Page.navigate", url=self.address)
        self._wait(lambda: self._loaded)
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._folder.cleanup()

    def send(self, method, **parameters):
        """One command of the protocol -> its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        number = self._number
        self._wait(lambda: number in self._answers)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def run(self, script):
        """The value of an expression in the page, which may be a promise."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def key(self, name):
        """Press a key and let go of it, on what has the focus."""
        for kind in ("keyDown", "keyUp"):
            code = KEYS[name]
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def drag(self, x, y, to_x, to_y):
        """Press the mouse at one place and let go at another."""
        for kind, where in (("mousePressed", (x, y)), ("mouseMoved", (to_x, to_y)), ("mouseReleased", (to_x, to_y))):
            buttons = 0 if kind == "mouseReleased" else 1
            place = {"x": where[0], "y": where[1], "button": "left", "buttons": buttons, "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, **place)

    def size(self, width, height):
        """The size of the window; up to 600 pixels it is a phone's."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width <= 600
        )

    def prefers(self, **features):
        """What the reader prefers: color_scheme="dark", reduced_motion="reduce"."""
        listed = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self.send("Emulation.setEmulatedMedia", features=listed)

    def picture(self, path, whole=True):
        """A PNG of the page."""
        import base64

        answer = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(answer["data"]))

    def _wait(self, until):
        end = time.monotonic() + self.seconds
        while not until():
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise TimeoutError(f"the browser gave no answer within {self.seconds} seconds")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise RuntimeError("the browser ended")
            *messages, self._rest = (self._rest + data).split(b"\0")
            for message in messages:
                self._take(json.loads(message))

    def _take(self, message):
        method, parameters = message.get("method"), message.get("params", {})
        if "id" in message:
            self._answers[message["id"]] = message
        elif method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.errors.append(parameters["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
