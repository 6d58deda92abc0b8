"""The carried models behind a server, and Chromium."""

import importlib.util
import os
import shutil

import pytest
import serving

import dpt

MODELS = ("dpt-tiny-depth", "dpt-tiny-scenes")


@pytest.fixture(scope="session")
def models():
    return {name: dpt.build(name, weights="pretrained", device="cpu") for name in MODELS}


@pytest.fixture(scope="module")
def address(models):
    """Not of the session: other tests would run beside its thread, and under it change what a process has once."""
    with serving.started(models, notes={MODELS[0]: "knows rendered scenes"}) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser():
    """Chromium by playwright; without it tests are skipped, but not where CI is set.

    Not of the session: playwright's end waits until all processes that were forked while its pipe was open have closed it, and other tests
    fork some."""
    missing = [name for name, found in (("playwright", importlib.util.find_spec("playwright")), ("chromium", chromium())) if not found]
    if missing:
        if os.environ.get("CI"):
            pytest.fail(f"CI is set, and there is no {' and no '.join(missing)}: the page would go untested")
        pytest.skip(f"there is no {' and no '.join(missing)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        running = started.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield running
        running.close()


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
