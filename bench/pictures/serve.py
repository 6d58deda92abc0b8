"""The page of `dpt serve` in Chromium, with an example's depth: needs playwright, and Chromium on the path."""

from __future__ import annotations

import io
import shutil

from PIL import Image

from ..serving import server

EXAMPLE = "scene-20000003.png"
SIZE = {"width": 1080, "height": 740}


def draw() -> Image.Image:
    """The page at `SIZE`, the pointer on the picture."""
    from playwright.sync_api import sync_playwright

    with server() as (address, _), sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(address)
        page.get_by_alt_text(EXAMPLE).click()
        page.wait_for_selector("body[data-state=shown]")
        box = page.locator("#stage").bounding_box()
        page.mouse.move(box["x"] + 0.66 * box["width"], box["y"] + 0.6 * box["height"])
        content = page.screenshot()
        browser.close()
    return Image.open(io.BytesIO(content)).convert("RGB")
