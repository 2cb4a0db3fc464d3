"""tools/draw.py: a drawing is made like the training images; the server's answers; the page in a real browser."""

import http.client
import io
import itertools
import json
import socket
import threading

import numpy as np
import pandas as pd
import pytest
from browser import CHROMIUM, Browser
from conftest import CLASSES, Command, make_competition
from PIL import Image, ImageDraw

import script
from tools import draw
from tools.draw import Preparation, Recognizer, describe_training_images, prepare, stroke_width

PLUS = [[(0.5, 0.1), (0.5, 0.9)], [(0.1, 0.5), (0.9, 0.5)]]
LATEX = dict(zip(CLASSES, ["|", "-", "+", r"\circ", "/"]))


def drawing(strokes: list, pen: int, side: int = 300, margin: int = 80) -> Image.Image:
    """Return a page with lines between points in 0..1."""
    page = Image.new("L", (side + 2 * margin, side + 2 * margin), 255)
    brush = ImageDraw.Draw(page)
    for stroke in strokes:
        points = np.array(stroke) * side + margin
        for first, last in itertools.pairwise(points):
            for x, y in np.linspace(first, last, 200):
                brush.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=0)
    return page


def ink_of(page: Image.Image) -> np.ndarray:
    return 255 - np.asarray(page)


def as_file(page: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    page.save(buffer, kind)
    return buffer.getvalue()


# ---- A drawing becomes an image like those of the training table -----------------------------------------------------

@pytest.mark.parametrize("pen", [8, 16, 30, 50])
def test_the_width_of_strokes_is_measured(pen):
    assert stroke_width(ink_of(drawing(PLUS[:1], pen)) > 127) == pytest.approx(pen, rel=0.15)


@pytest.mark.parametrize("pen", [8, 16, 30, 50])
def test_a_drawing_gets_strokes_as_wide_as_those_of_the_training_images(pen):
    like = Preparation(stroke=0.08, binary=True)
    reference = prepare(ink_of(drawing(PLUS, 24)), 32, like)
    image = prepare(ink_of(drawing(PLUS, pen)), 32, like)
    assert image.shape == (32, 32) and set(np.unique(image)) == {0, 255}
    assert (image != reference).mean() < 0.06
    plain = prepare(ink_of(drawing(PLUS, pen)), 32, Preparation())
    assert plain.max() > 100 and (plain[0] > 0).any() and (plain[-1] > 0).any()  # it fills the image


def test_areas_are_not_thinned():
    disc = drawing([[(0.5, 0.5), (0.5, 0.5)]], 200)
    assert (prepare(ink_of(disc), 32, Preparation(stroke=0.05, binary=True)) > 0).mean() > 0.7


def test_what_training_images_look_like_is_measured():
    symbols = np.stack([prepare(ink_of(drawing(PLUS, pen)), 32, Preparation(binary=True)) for pen in (20, 24, 28)])
    found = describe_training_images(symbols)
    assert found.extent == 1 and found.binary and 0.06 < found.stroke < 0.14
    rng, digits = np.random.default_rng(0), []
    for _ in range(20):  # an L, whose centre of mass is not that of its box, put in the middle by its mass
        digit = prepare(ink_of(drawing([[(0, 0), (0, 1), (rng.uniform(0.3, 0.6), 1)]], 30)), 28,
                        Preparation(extent=0.7, by_mass=True))
        digits.append(digit)
    found = describe_training_images(np.stack(digits))
    assert found.extent == pytest.approx(0.7, abs=0.04) and found.by_mass and not found.binary


def test_blank_training_images_say_nothing():
    assert describe_training_images(np.zeros((3, 8, 8), dtype=np.uint8)) == Preparation()


# ---- The server ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("draw")
    data = make_competition(folder / "competition", 200)
    pd.DataFrame({"label": list(LATEX), "latex": list(LATEX.values())}).to_csv(data / "classes.csv", index=False)
    command = Command(data, folder / "out", folder / "cache")
    assert script.main(command.arguments("--num-epochs", "4", "--batch-size", "16", "--image-size", "24",
                                         "--no-pictures")) == 0
    return command


@pytest.fixture(scope="module")
def recognizer(trained):
    checkpoint = script.load_checkpoint(trained.output / "best_model.pth")
    given = type("Given", (), {"cache_dir": str(trained.cache), "data_dir": None, "train_csv": None, "root_dir": None})
    images, targets = draw.open_training_images(checkpoint, given)
    assert len(images) == len(checkpoint.model.keys)
    return Recognizer(checkpoint, LATEX, images, targets)


@pytest.fixture(scope="module")
def server(recognizer):
    with draw.make_server(recognizer, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server, body: bytes = b"", method: str = "POST", path: str = "/classify", headers: dict | None = None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, body if method == "POST" else None, headers or {})
    response = connection.getresponse()
    return response.status, response.read(), response.headers


def test_it_listens_on_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(("name", "strokes"), [("|", PLUS[:1]), ("-", PLUS[1:]), ("+", PLUS),
                                               ("/", [[(0.2, 0.9), (0.8, 0.1)]])])
@pytest.mark.parametrize("pen", [10, 30])
def test_a_drawing_is_recognised(server, name, strokes, pen):
    status, body, _ = ask(server, as_file(drawing(strokes, pen)))
    answer = json.loads(body)
    assert status == 200 and answer["classes"][0]["name"] == name
    probabilities = [found["probability"] for found in answer["classes"]]
    assert probabilities == sorted(probabilities, reverse=True) and 0.99 < sum(probabilities) < 1.01  # of five classes
    assert answer["nearest"][0]["name"] == answer["classes"][0]["name"]
    assert all(near["image"].startswith("data:image/png;base64,") for near in answer["nearest"])


@pytest.mark.parametrize("change", [lambda page: as_file(page, "JPEG"), lambda page: as_file(page.convert("RGBA")),
                                    lambda page: as_file(Image.eval(page, lambda grey: 255 - grey))])
def test_any_image_file_is_a_drawing(server, change):
    status, body, _ = ask(server, change(drawing(PLUS, 20)))
    assert status == 200 and json.loads(body)["classes"][0]["name"] == "+"


def test_a_blank_drawing_has_no_classes(server):
    assert ask(server, as_file(Image.new("L", (300, 300), 255)))[:2] == (200, b'{"classes": []}')


def test_what_is_no_image_is_refused(server):
    for body, text in ((b"", "the file is empty"), (b"drop table", "not an image"),
                       (b"\x89PNG\r\n\x1a\n", "not an image"),
                       (as_file(Image.new("1", (8000, 8000))), "8000 x 8000 pixels are too many")):
        status, answer, _ = ask(server, body)
        assert status == 400 and text in json.loads(answer)["error"]
    assert ask(server, as_file(drawing(PLUS, 20)))[0] == 200, "it still answers"


def test_a_truncated_image_is_refused(server):
    status, answer, _ = ask(server, as_file(drawing(PLUS, 20))[:300])
    assert status == 400 and json.loads(answer)["error"].startswith("the drawing: ")


def test_bodies_that_are_too_large_are_not_read(server):
    with socket.create_connection(server.server_address, timeout=30) as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999\r\n\r\n")
        assert b" 413 " in connection.recv(1000)
    with socket.create_connection(server.server_address, timeout=30) as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b" 411 " in connection.recv(1000)


def test_pages_of_other_sites_are_not_answered(server):
    for method, path in (("POST", "/classify"), ("GET", "/")):
        assert ask(server, as_file(drawing(PLUS, 20)), method, path, {"Host": "evil.example:8000"})[0] == 403


def test_the_page_and_the_pictures_of_classes(server):
    status, body, headers = ask(server, method="GET", path="/")
    assert status == 200 and b"<canvas" in body and headers["Content-Type"].startswith("text/html")
    assert b"://" not in body, "it needs nothing from outside"
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    status, body, headers = ask(server, method="GET", path="/symbol/3")
    assert status == 200 and b"<svg" in body and headers["Content-Type"] == "image/svg+xml"
    for path in ("/symbol/5", "/symbol/-1", "/symbol/x", "/symbol/99999999999999999999", "/../draw.py", "/other"):
        assert ask(server, method="GET", path=path)[0] == 404
    assert ask(server, path="/other")[0] == 404


def test_a_port_in_use_is_named(server, trained, capsys):
    checkpoint = str(trained.output / "best_model.pth")
    assert draw.main([checkpoint, "--port", str(server.server_port), "--cache-dir", str(trained.cache)]) == 2
    assert f"error: port {server.server_port} cannot be used (address already in use)" in capsys.readouterr().err


def test_without_training_images_it_answers(trained, tmp_path, capsys):
    checkpoint = script.load_checkpoint(trained.output / "best_model.pth")
    given = type("Given", (), {"cache_dir": "", "data_dir": str(tmp_path), "train_csv": None, "root_dir": None})
    recognizer = Recognizer(checkpoint, {}, *draw.open_training_images(checkpoint, given))
    assert "name their folder with --data-dir" in capsys.readouterr().err
    answer = recognizer.answer(as_file(drawing(PLUS, 40)))
    assert len(answer["classes"]) == 5 and answer["nearest"] == []


# ---- The page in a browser -------------------------------------------------------------------------------------------

@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: install Debian's package chromium")
@pytest.mark.parametrize("pointer", ["mouse", "pen", "finger"])
def test_a_symbol_is_drawn_in_a_browser(server, tmp_path, pointer):
    names = "[...document.querySelectorAll('.answer .name')].map(name => name.textContent)"
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{server.server_port}/")
        browser.value("pointers = new Set(); addEventListener('pointermove', event => pointers.add(event.pointerType))")
        left, top, side = browser.value("(box => [box.left, box.top, box.width])"
                                        "(document.querySelector('canvas').getBoundingClientRect())")
        for stroke in PLUS:
            points = np.linspace(*np.array(stroke), 20) * side * 0.8 + [left + 0.1 * side, top + 0.1 * side]
            browser.stroke(points.tolist(), pointer)
        assert browser.value("[...pointers].join()") == {"finger": "touch"}.get(pointer, pointer)
        browser.wait_for(f"({names}).length === 5 && ({names})[0] === '+'")
        browser.wait_for("[...document.images].length > 6 && [...document.images].every(image => image.complete)")
        assert browser.value("[...document.images].every(image => image.naturalWidth > 0)")
        browser.screenshot(tmp_path / "draw.png")
        browser.value("document.getElementById('undo').click()")
        browser.wait_for(f"({names})[0] === '|'")
        browser.value("document.getElementById('clear').click()")
        browser.wait_for("document.querySelectorAll('.answer').length === 0")
        assert browser.errors == []
    assert np.asarray(Image.open(tmp_path / "draw.png").convert("L")).std() > 5
