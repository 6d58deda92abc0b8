"""The README's figures, code and commands, and every page's links."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.pictures import stereo
from bench.pictures.__main__ import NAMES
from dpt.commands.main import COMMANDS
from dpt.training.recipes import Recipe

ROOT = Path(__file__).parents[2]
THROUGHPUT = "throughput, over one client's"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table_rows(text: str) -> set[tuple[str, ...]]:
    return {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if line.startswith("|")}


@pytest.mark.parametrize("what", ["depth", "scenes"])
def test_evaluation_is_what_was_measured(what):
    """Blind spot: a figure that no file shows. Each predictor's row holds its figures of docs/evaluation-*.json."""
    measured = json.loads((ROOT / "docs" / f"evaluation-{what}.json").read_text())
    assert measured["pictures"] == 500
    rows = {(row[0].strip("`"), *row[1:]) for row in table_rows(README)}
    for predictor, figures in measured["figures"].items():
        assert (predictor, *(f"{value:.3f}" for value in figures.values())) in rows


def test_the_recorded_training_is_what_is_told_of_it():
    """Blind spot: figures that no file shows, of a run with another recipe."""
    folder, text = ROOT / "docs" / "training-two-processes", (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    run, measured = (json.loads((folder / name).read_text()) for name in ("run.json", "evaluation.json"))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    recipe = Recipe.of("scenes").with_changes(re.search(r"dpt train scenes .*--set (.*)", text)[1].split())
    assert json.loads(json.dumps(asdict(recipe))).items() >= run["recipe"].items() and len(run["recipe"]) > 40 and run["processes"] == 2
    assert rows[-1]["step"] == recipe.steps and f"took {rows[-1]['seconds']} seconds" in text
    assert f"at most {max(row.get('memory', 0) for row in rows):.2f} GB" in text
    figures = measured["figures"]["dpt-tiny-scenes"]
    assert measured["pictures"] == 500 and f"the mIoU is\n{figures['miou']:.3f} and the pixel accuracy {figures['accuracy']:.3f}," in text


def test_first_code_runs(monkeypatch):
    """Blind spot: four lines that nobody tried."""
    monkeypatch.chdir(ROOT)
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    names = {}
    exec(block, names)
    assert names["prediction"].depth.ndim == 2 and names["prediction"].depth.dtype == "float32"


def test_figures_of_clips_are_what_was_measured():
    """Blind spot: a figure that no file shows, or one that breaks what is promised of it."""
    record, text = json.loads((ROOT / "docs" / "video.json").read_text()), (ROOT / "docs" / "video.md").read_text(encoding="utf-8")
    words = " ".join(text.split())
    changes, errors = ([of[what] for of in record["flicker"].values()] for what in ("change", "error"))
    assert max(changes) < 0.5 and f"changes {min(changes):.2f} to {max(changes):.2f} of what" in words
    assert f"with {min(errors):.3f} to {max(errors):.3f} of its error" in words
    sizes = record["memory"]["of the first"]
    assert record["memory"]["frames"] == 2000 and len(sizes) >= 19 and max(sizes) < 1.1
    assert f"After 2000 frames the process has {sizes[-1]:.2f} times the memory" in words


def test_figures_of_the_server_are_what_was_measured():
    """Blind spot: as above, of sixteen clients in a minute."""
    record, text = json.loads((ROOT / "docs" / "serving.json").read_text()), (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    words = " ".join(text.split())
    assert record["clients"] == 16 and record["seconds"] == 60 and record["errors"] == {} and record["questions with two answers"] == 0
    assert record["mean batch"] > 1 and record["memory, end over beginning"] < 1.1
    assert f"{record['requests']} requests without an error, of {record['questions']} questions" in words
    assert f"{record['runs']} runs of the network, which saw {record['mean batch']} pictures each" in words
    assert f"at its most {record['memory, end over beginning']} times" in words
    assert f"got {record[THROUGHPUT]} times the answers of one alone" in words


@pytest.mark.parametrize("name", NAMES)
def test_pages_have_their_pictures(name):
    """Blind spot: a page without its picture, or without the command that makes it."""
    text = " ".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").split())
    assert f"({name}.png)" in text and f"`python -m bench.pictures {name}`" in text and (ROOT / "docs" / f"{name}.png").exists()


def test_a_picture_is_what_its_command_makes():
    """Blind spot: a picture of another version of the code."""
    drawn, kept = (np.asarray(picture.convert("RGB")).astype(int) for picture in (stereo.draw(), Image.open(ROOT / "docs" / "stereo.png")))
    assert drawn.shape == kept.shape and np.abs(drawn - kept).mean() < 2


def test_links_lead_somewhere():
    """Blind spot: a file that was renamed."""
    pages = [path for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
    assert len(pages) > 5
    for page in pages:
        text = page.read_text(encoding="utf-8")
        missing = [link for link in re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)", text) if not (page.parent / link).exists()]
        assert not missing, page


def test_commands_exist():
    """Blind spot: a command or a make target that is promised and not there."""
    assert set(re.findall(r"^dpt (\w+)", README, re.MULTILINE)) <= set(COMMANDS)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)", "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)))) <= targets
