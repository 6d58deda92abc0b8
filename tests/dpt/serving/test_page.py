"""The page in Chromium, as somebody uses it. Blind spot: other browsers, and a touch screen."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import serving
from PIL import Image
from serving import LIMITS, post

import dpt
from dpt.commands.demo import PICTURES
from dpt.inference import outputs

DEPTH, SCENES = "dpt-tiny-depth", "dpt-tiny-scenes"
REFUSED = re.compile(r"Failed to load resource: the server responded with a status of 4\d\d")  # which Chromium says of each, unasked
DROP = """([name, content]) => {
  const carried = new DataTransfer();
  carried.items.add(new File([Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0))], name, { type: "image/png" }));
  for (const type of ["dragenter", "dragover", "drop"])
    document.getElementById("drop").dispatchEvent(new DragEvent(type, { dataTransfer: carried, bubbles: true, cancelable: true }));
}"""
PASTE = DROP.replace('for (const type of ["dragenter", "dragover", "drop"])', "").replace(
    'document.getElementById("drop").dispatchEvent(new DragEvent(type, { dataTransfer: carried, bubbles: true, cancelable: true }))',
    'document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: carried, bubbles: true }))',
)


@pytest.fixture(scope="module")
def predicted(models):
    return {name: model.predict(PICTURES[1], batch_size=2) for name, model in models.items()}


@pytest.fixture
def opened(browser, address):
    """A page of a window of its own; at the end nothing was amiss on its console, and nobody but the server was asked."""
    context = browser.new_context(viewport={"width": 1100, "height": 800}, accept_downloads=True)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("body[data-state=ready]")
    yield page
    context.close()
    assert [line for line in said if not REFUSED.match(line)] == []
    assert asked and all(url.startswith((address, f"blob:{address}")) for url in asked)


def shown(page, state: str = "shown") -> None:
    page.wait_for_selector(f"body[data-state={state}]", timeout=30000)


def drop(page, content: bytes, name: str = "a scene.png", how: str = DROP) -> None:
    page.evaluate(how, [name, base64.b64encode(content).decode()])


def point_at(page, x: int, y: int, size: tuple[int, int] = (384, 384)) -> str:
    """What stands under the mouse at a pixel of the picture."""
    box = page.locator("#stage").bounding_box()
    page.mouse.move(box["x"] + box["width"] * (x + 0.5) / size[0], box["y"] + box["height"] * (y + 0.5) / size[1])
    said = page.locator("#value").inner_text()
    assert re.search(r"at column (\d+), row (\d+)", said).groups() == (str(x), str(y))
    return said.splitlines()[0]


def downloaded(page, kind: str) -> tuple[str, bytes]:
    with page.expect_download() as found:
        page.click(f"#downloads button[data-as={kind}]")
    return found.value.suggested_filename, found.value.path().read_bytes()


def pixels(page, canvas: str) -> np.ndarray:
    """What a canvas shows, (H, W, 3)."""
    url = page.evaluate("id => document.getElementById(id).toDataURL('image/png')", canvas)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def test_a_picture_is_dropped_and_its_depth_is_read(opened, predicted, models):
    """Blind spot: values of another pixel; colours that are not the model's; a slider that moves nothing."""
    depth, head = predicted[DEPTH].depth, models[DEPTH].config.head
    drop(opened, PICTURES[1].read_bytes())
    shown(opened)
    assert opened.locator("#name").inner_text() == "a scene.png" and not opened.locator("#drop").is_visible()
    for x, y in ((0, 0), (383, 383), (120, 250), (300, 77)):
        kind, value = point_at(opened, x, y).rsplit(" ", 1)
        assert kind == "inverse depth" and float(value) == pytest.approx(depth[y, x], rel=6e-4)
        assert opened.locator("#tip").inner_text() == f"inverse depth {value}"
    assert "Not metres" in opened.locator("#meaning").inner_text()
    assert float(opened.locator("#near").inner_text().removeprefix("near ")) == pytest.approx(depth.max(), rel=6e-4)
    assert np.array_equal(pixels(opened, "picture"), np.asarray(Image.open(PICTURES[1]).convert("RGB")))
    assert abs(pixels(opened, "map").astype(int) - outputs.colored(depth, head.inverse)).max() <= 1
    before = opened.evaluate("getComputedStyle(document.getElementById('map')).clipPath")
    opened.focus("#slider")
    for _ in range(20):
        opened.keyboard.press("ArrowRight")
    after = opened.evaluate("getComputedStyle(document.getElementById('map')).clipPath")
    assert (before, after) == ("inset(0px 0px 0px 50%)", "inset(0px 0px 0px 70%)")
    box = opened.locator("#stage").bounding_box()
    opened.mouse.move(box["x"] + 200, box["y"] + 50)
    opened.mouse.down()
    opened.mouse.move(box["x"] + box["width"] / 4, box["y"] + 60)
    opened.mouse.up()
    assert opened.input_value("#slider") == "25"


def test_values_by_the_keyboard(opened, predicted):
    """Blind spot: what only a mouse can read."""
    drop(opened, PICTURES[1].read_bytes())
    shown(opened)
    opened.focus("#stage")
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("Shift+ArrowDown")
    said = opened.locator("#value").inner_text()
    assert "column 193, row 202" in said and opened.locator("#value").get_attribute("aria-live") == "polite"
    assert float(said.split()[2]) == pytest.approx(predicted[DEPTH].depth[202, 193], rel=6e-4)


def test_downloads_are_the_models(opened, predicted, address):
    """Blind spot: a download that is another picture's, or of no file's name."""
    content = PICTURES[1].read_bytes()
    opened.set_input_files("#file", PICTURES[1])
    shown(opened)
    stem = PICTURES[1].stem
    assert [button.get_attribute("data-as") for button in opened.locator("#downloads button").all()] == "png16 ply colours npy json".split()
    for kind, suffix in {"png16": ".png", "ply": ".ply", "npy": ".npy", "colours": "_colours.png"}.items():
        name, found = downloaded(opened, kind)
        assert name == f"{stem}_{DEPTH}{suffix}" and found == post(address, content, f"model={DEPTH}&as={kind}")[2]
        if kind == "png16":
            depth = predicted[DEPTH].depth.astype(np.float64)
            spread = np.rint(65535 * (depth - depth.min()) / (depth.max() - depth.min()))
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(found))), spread)
        if kind == "npy":
            assert np.array_equal(np.load(io.BytesIO(found)), predicted[DEPTH].depth)
    opened.select_option("#model", SCENES)
    opened.wait_for_selector("#classes:not([hidden])")
    name, found = downloaded(opened, "labels")
    assert name == f"{stem}_{SCENES}_labels.png" and np.array_equal(np.asarray(Image.open(io.BytesIO(found))), predicted[SCENES].labels)


def test_classes_are_named(opened, predicted, models):
    """Blind spot: the class of another pixel; shares that are not those of the map."""
    labels, head = predicted[SCENES].labels, models[SCENES].config.head
    opened.select_option("#model", SCENES)
    with opened.expect_file_chooser() as chooser:
        opened.click("#choose")
    chooser.value.set_files(PICTURES[1])
    shown(opened)
    for x, y in ((5, 5), (200, 300), (120, 250)):
        assert point_at(opened, x, y) == head.classes[labels[y, x]]
        assert head.classes[labels[y, x]] in opened.locator("#classes li.here").inner_text()
    shares = [line.split("\n") for line in opened.locator("#classes li").all_inner_texts()]
    wanted = sorted(((labels == index).mean(), head.classes[index]) for index in np.unique(labels))[::-1]
    assert [(name, share) for name, share in shares] == [(name, f"{100 * share:.1f} %") for share, name in wanted]


def test_a_broken_file_and_then_a_good_one(opened, address):
    """Blind spot: a page that says nothing, or that has to be loaded anew; a message that stays."""
    drop(opened, b"\x89PNG\r\n\x1a\nbroken", "broken.png")
    shown(opened, "failed")
    assert opened.locator("#error").inner_text().startswith("broken.png: cannot be decoded")
    assert opened.locator("#drop").is_visible() and opened.locator("#choose").is_enabled()
    file = io.BytesIO()
    Image.new("1", (2048, 1024)).save(file, "PNG")  # which the browser can show
    drop(opened, file.getvalue(), "many.png")
    opened.locator("#error").filter(has_text="many.png: 2048x1024 pixels, 2.1 million: more than the limit").wait_for()
    opened.wait_for_selector("#drop", state="visible")
    drop(opened, b"<b>text</b>", "<b>text.png")
    opened.locator("#error").filter(has_text="<b>text.png: not a picture").wait_for()
    opened.get_by_alt_text("Example").first.click()
    shown(opened)
    assert not opened.locator("#error").is_visible()
    first = pixels(opened, "map")
    drop(opened, PICTURES[1].read_bytes()[:5000], "short.png")
    shown(opened, "failed")
    assert "short.png" in opened.locator("#error").inner_text() and np.array_equal(pixels(opened, "map"), first)
    assert point_at(opened, 10, 20).startswith("inverse depth")
    drop(opened, bytes(LIMITS["max_bytes"] + 1), "large.png")
    assert "large.png: 1.0 MiB, and at most 1.0 MiB are taken" in opened.locator("#error").inner_text()
    drop(opened, PICTURES[1].read_bytes(), how=PASTE)
    shown(opened)
    assert opened.locator("#error").is_hidden() and not np.array_equal(pixels(opened, "map"), first)


def test_while_one_is_predicted(opened, predicted):
    """Blind spot: the values of the picture before, under the next one; an answer that comes late and takes the place of a later one's."""
    drop(opened, PICTURES[1].read_bytes())
    shown(opened)
    given_up = []
    asked = iter([lambda route: None])  # the first is never answered
    opened.on("requestfailed", lambda request: given_up.append(request.url))
    opened.route("**/predict*", lambda route: next(asked, lambda other: other.continue_())(route))
    drop(opened, PICTURES[0].read_bytes(), "late.png")
    opened.wait_for_selector("#busy", state="visible")
    opened.mouse.move(*(opened.locator("#stage").bounding_box()[side] + 30 for side in "xy"))
    assert opened.locator("#value").inner_text() == "–" and opened.locator("#tip").is_hidden()
    assert opened.locator("#busy").inner_text() == "Predicting depth…"
    drop(opened, PICTURES[2].read_bytes(), "last.png")
    opened.locator("#name").filter(has_text="last.png").wait_for()
    assert len(given_up) == 1 and opened.locator("#error").is_hidden()
    assert np.array_equal(pixels(opened, "picture"), np.asarray(Image.open(PICTURES[2]).convert("RGB")))


def test_a_file_that_the_browser_cannot_read(opened):
    """Blind spot: a TIFF, which the server reads, beside an empty canvas; its turn by EXIF data."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6
    Image.open(PICTURES[1]).convert("RGB").crop((0, 0, 384, 200)).save(file, "TIFF", exif=exif)
    drop(opened, file.getvalue(), "turned.tif")
    shown(opened)
    wanted = np.asarray(Image.open(PICTURES[1]).convert("RGB").crop((0, 0, 384, 200)).transpose(Image.Transpose.ROTATE_270))
    assert abs(pixels(opened, "picture").astype(int) - wanted).mean() < 5 and pixels(opened, "map").shape == wanted.shape


def test_metres_are_read_as_metres(browser, models):
    """Blind spot: metres without their unit, or whose near end is the far one."""
    model = dpt.build(DEPTH, weights="pretrained", device="cpu")
    model.config = model.config.with_("head", inverse=False)
    with serving.started({"metric": model}) as (address, _):
        depth = model.predict(PICTURES[1], batch_size=2).depth
        page = browser.new_page()
        page.goto(address)
        page.set_input_files("#file", PICTURES[1])
        shown(page)
        assert float(re.fullmatch(r"(\S+) m", point_at(page, 40, 300))[1]) == pytest.approx(depth[300, 40], rel=6e-4)
        near, far = (float(re.fullmatch(rf"{end} (\S+) m", page.locator(f"#{end}").inner_text())[1]) for end in ("near", "far"))
        assert near == pytest.approx(depth.min(), rel=6e-4, abs=1e-3) and far == pytest.approx(depth.max(), rel=6e-4)
        assert page.locator("#value-title").text_content() == "Distance"
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_dark(browser, address, scheme):
    """Blind spot: a page that is wider than a phone; letters that are as dark as what is behind them."""
    context = browser.new_context(viewport={"width": 320, "height": 640}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("body[data-state=ready]")
    assert wide(page) <= 320
    drop(page, PICTURES[1].read_bytes(), "a-name-that-is-too-long-for-any-telephone-to-show-in-one-line-of-its-screen.png")
    shown(page)
    assert wide(page) <= 320
    back, letters, quiet = (brightness(page, *of) for of in (("body", "backgroundColor"), ("body", "color"), ("#meaning", "color")))
    assert (back < 0.05) == (scheme == "dark") and all((max(back, one) + 0.05) / (min(back, one) + 0.05) > 4.5 for one in (letters, quiet))
    context.close()


def wide(page) -> int:
    return page.evaluate("document.documentElement.scrollWidth")


def brightness(page, element: str, what: str) -> float:
    """The relative luminance of a colour, as WCAG has it: contrast of letters is to be above 4.5."""
    colour = page.evaluate("([element, what]) => getComputedStyle(document.querySelector(element))[what]", [element, what])
    values = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    return float(np.dot([0.2126, 0.7152, 0.0722], [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]))
