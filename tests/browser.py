"""A real browser for tests: Chromium without a window, driven over its debugging pipe (Chrome DevTools Protocol)."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Context manager: one page of a browser."""

    def __init__(self, profile: Path, width: int = 1000, height: int = 700):
        requests, self.requests = os.pipe()
        self.answers, answers = os.pipe()

        def connect() -> None:  # the browser reads descriptor 3 and writes 4
            for place, copied in ((3, os.dup(requests)), (4, os.dup(answers))):
                os.dup2(copied, place)

        self.process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--remote-debugging-pipe", f"--window-size={width},{height}", f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=connect, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(requests)
        os.close(answers)
        self.number, self.buffer, self.session = 0, b"", None
        self.errors = []  # what the page's scripts throw and what they print as errors
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.requests)
        os.close(self.answers)

    def _read(self) -> dict:
        while b"\0" not in self.buffer:
            part = os.read(self.answers, 2**16)
            if not part:
                raise RuntimeError("the browser has ended")
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **params: object) -> dict:
        """Call a method of the protocol and return its result."""
        self.number += 1
        request = {"id": self.number, "method": method, "params": params}
        os.write(self.requests, json.dumps(request | ({"sessionId": self.session} if self.session else {})).encode()
                 + b"\0")
        while True:
            message = self._read()
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"])
            elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.errors.append(message["params"]["entry"])
            if message.get("id") == self.number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def value(self, expression: str) -> object:
        """Return the value of a JavaScript expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 30) -> object:
        """Return the value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (found := self.value(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression} is {found!r}; errors of the page: {self.errors}")
            time.sleep(0.05)
        return found

    def open(self, address: str) -> None:
        """Open an address and wait until it is there."""
        self.call("Page.navigate", url=address)
        self.wait_for(f"location.href.startsWith({json.dumps(address)}) && document.readyState === 'complete'")

    def stroke(self, points: list[tuple[float, float]], pointer: str = "mouse") -> None:
        """Press mouse, pen or finger at the first point of the page, move it along the others and lift it."""
        def send(kind: str, point: tuple[float, float]) -> None:
            if pointer == "finger":
                names = {"Pressed": "touchStart", "Moved": "touchMove", "Released": "touchEnd"}
                touched = [] if kind == "Released" else [{"x": point[0], "y": point[1]}]
                self.call("Input.dispatchTouchEvent", type=names[kind], touchPoints=touched)
            else:
                self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=point[0], y=point[1], button="left",
                          clickCount=1, buttons=int(kind != "Released"), pointerType=pointer)

        send("Pressed", points[0])
        for point in points[1:]:
            send("Moved", point)
        send("Released", points[-1])

    def screenshot(self, path: Path) -> None:
        """Write a picture of the page."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
