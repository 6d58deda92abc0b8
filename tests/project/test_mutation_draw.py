"""What `make mutate` draws from dpt/, and that it tells who notices from who does not, on a package made up for it."""

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import mutate  # noqa: E402
import mutation_draw  # noqa: E402

SOURCE = '''"""A docstring with 1 < 2."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import nothing
LIMIT: int = 3


class Box:
    def inside(self, ä, x: "list[int]" = (1, 2.5), *, flag=True) -> "tuple[1]":
        """Not 3."""
        s = f"{x + 1}"
        if not flag and "é" < ä not in x:
            return "a text for people" + s
        while x is not None: x = x // (2) ** 3
        return {"key": not x, **dict(mode="bilinear", help="word")}["key"] or zip(x, x, strict=True)
'''
MADE = {
    ("comparison", 'if not flag and "é" <= ä not in x:'),
    ("comparison", 'if not flag and "é" < ä in x:'),
    ("comparison", "while x is None: x = x // (2) ** 3"),
    ("arithmetic", "while x is not None: x = x * (2) ** 3"),
    ("arithmetic", "while x is not None: x = x // (2) * 3"),
    ("number", "LIMIT: int = 4"),
    ("number", 'def inside(self, ä, x: "list[int]" = (2, 2.5), *, flag=True) -> "tuple[1]":'),
    ("number", 'def inside(self, ä, x: "list[int]" = (1, 5.0), *, flag=True) -> "tuple[1]":'),
    ("number", "while x is not None: x = x // (3) ** 3"),
    ("number", "while x is not None: x = x // (2) ** 4"),
    ("text", 'return {"keyx": not x, **dict(mode="bilinear", help="word")}["key"] or zip(x, x, strict=True)'),
    ("text", 'return {"key": not x, **dict(mode="bilinearx", help="word")}["key"] or zip(x, x, strict=True)'),
    ("text", 'return {"key": not x, **dict(mode="bilinear", help="word")}["keyx"] or zip(x, x, strict=True)'),
    ("text", 'if not flag and "éx" < ä not in x:'),
    ("flag", 'def inside(self, ä, x: "list[int]" = (1, 2.5), *, flag=False) -> "tuple[1]":'),
    ("condition", 'if not flag or "é" < ä not in x:'),
    ("condition", 'if flag and "é" < ä not in x:'),
    ("condition", 'if not (not flag and "é" < ä not in x):'),
    ("condition", 'return {"key": x, **dict(mode="bilinear", help="word")}["key"] or zip(x, x, strict=True)'),
    ("condition", 'return {"key": not x, **dict(mode="bilinear", help="word")}["key"] and zip(x, x, strict=True)'),
}


def test_each_kind_of_mutation_is_made():
    """Blind spot: a kind that is never drawn; a change in the wrong place behind letters of several bytes; docstrings, annotations, texts
    for people; and what changes nothing."""
    found = [mutation for _, mutation in mutation_draw.mutations(SOURCE, "dpt/box.py")]
    assert {(each.kind, each.becomes) for each in found} == MADE and len(found) == len(MADE)
    assert {each.kind for each in found} == set(mutation_draw.KINDS)
    assert {each.function for each in found} == {"", "Box.inside"}
    for each in found:
        changed = each.made(SOURCE)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))
        assert SOURCE.splitlines()[each.number - 1].strip() == each.line != each.becomes == changed.splitlines()[each.number - 1].strip()


def test_a_draw_does_not_depend_on_where_code_stands(tmp_path):
    """Blind spot: a list of the unnoticed that is worthless after every change elsewhere; a table that fills the draw."""
    table = "TABLE = [" + ", ".join(map(str, range(500))) + "]\n"
    files = {"a.py": SOURCE, "b.py": table + "\n".join(f"def f{n}(x): return x < {n} and x + {n}" for n in range(20))}
    counts = {"comparison": 5, "arithmetic": 4, "number": 3}

    def drawn(files: dict[str, str], seed: int = 0) -> set[tuple[str, ...]]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        found = mutation_draw.candidates(folder, sorted(folder.iterdir()), seed)
        assert sum(each.line.startswith("TABLE") for each in found) == 1
        chosen = mutation_draw.draw(found, counts, seed)
        assert Counter(each.kind for each in chosen) == counts
        return {(each.function, each.becomes) for each in chosen}

    first = drawn(files)
    assert first != drawn(files, seed=1)
    assert first == drawn({"c.py": "def g(): pass\n\n\n" + files["b.py"], "d/e.py".replace("/", "_"): SOURCE})


CODE = """def limit(x):
    if x < 3:
        return x
    n = 3
    while n > 0:
        n = n - 1
    return 3 * 1
"""
TEST = """from dpt.box import limit


def test():
    assert limit(2) == 2 and limit(5) == 3
"""


FILES = {"dpt/__init__.py": "", "dpt/box.py": CODE, "test_box.py": TEST, ".gitignore": "/out/\n*.part\n"}
IGNORED = {"out/large": "", "dpt/out/a.part": "", "dpt/out/b": ""}  # but for the last


@pytest.fixture
def chosen(tmp_path) -> dict[str, mutation_draw.Mutation]:
    """The mutations of a small package, by what a line becomes."""
    for name, text in {**FILES, **IGNORED}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return {each.becomes: each for _, each in mutation_draw.mutations(CODE, "dpt/box.py")}


def test_who_notices_is_told_apart(tmp_path, chosen, monkeypatch, capsys):
    """Blind spot: a mutation that is never made, or stays made; tests that hang taken for tests that pass; tests that fail anyway; a
    mutation that is listed and is noticed after all."""
    same, less, endless = (chosen[line] for line in ("if x <= 3:", "return 4 * 1", "n = n + 1"))
    settings = {"tests": {"dpt": ["test_box.py"]}}
    listed: dict[tuple[str, ...], str] = {}
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setattr(mutate, "settings", lambda name: settings)
    monkeypatch.setattr(mutate, "reasons", lambda: listed)
    monkeypatch.setattr(mutate, "PATIENCE", 3)

    def tried(*mutations, required: float = 0.5) -> tuple[int, list[str]]:
        """How much is wrong, and what is said of each mutation."""
        with mutate.copies(tmp_path, 2) as free:
            assert not (free.queue[0] / "out").exists() and [path.name for path in (free.queue[0] / "dpt" / "out").iterdir()] == ["b"]
            wrong = mutate.try_drawn(list(mutations), free, 2, required)
            assert {(copy / "dpt/box.py").read_text() for copy in free.queue} == {CODE}
        return wrong, [line[9:21].strip() for line in capsys.readouterr().out.splitlines() if " dpt/box.py:" in line]

    assert tried(same, less, endless, required=0.9) == (2, ["NOT NOTICED", "noticed", "noticed"])  # one unnoticed, and too few
    listed[same.key] = "both give 3"
    assert tried(less, same) == (0, ["noticed", "listed"])
    listed[less.key] = "none"
    assert tried(less)[0] == 1
    (tmp_path / "test_box.py").write_text("def test():\n    assert False\n")
    assert tried(same) == (2, [])  # tests that fail anyway tell nothing


def test_a_run_that_is_interrupted_ends(tmp_path, chosen):
    """Blind spot: tests that go on, without end, in folders that are gone."""
    endless = chosen["n = n + 1"].made(CODE)
    trials = [mutate.Trial(name, "dpt/box.py", text, ("test_box.py",), 600) for name, text in (("same", CODE), ("endless", endless))] * 2
    with mutate.copies(tmp_path, 2) as free:
        found = mutate.outcomes(trials, free, 2)
        assert next(found)[1].code == 0
        found.close()
        assert not mutate._running and {(copy / "dpt/box.py").read_text() for copy in free.queue} == {CODE}


def test_every_file_has_tests_and_they_exist():
    """Blind spot: a part of dpt that no test is run for."""
    table = mutate.settings("draw.toml")["tests"]
    for file in (mutate.ROOT / "dpt").rglob("*.py"):
        tests = mutate.tests_of(file.relative_to(mutate.ROOT).as_posix(), table)
        assert tests[0].endswith(".py") and all((mutate.ROOT / test).is_file() for test in tests if test.startswith("tests/"))
    assert all((mutate.ROOT / part).exists() for part in table)
    with pytest.raises(ValueError, match="no tests for bench/cases"):
        mutate.tests_of("bench/cases", table)


def test_the_draw_and_what_is_listed_of_it():
    """Blind spot: a reason for code that is no more; more of them than may be; a mutation that is no Python, and so noticed by all."""
    drawn, listed = mutate.drawn(), mutate.reasons()
    assert len(drawn) == sum(mutate.settings("draw.toml")["counts"].values()) == 150
    for mutation in drawn:
        ast.parse(mutation.made((mutate.ROOT / mutation.file).read_text(encoding="utf-8")))
    assert sum(mutation.key in listed for mutation in drawn) <= (1 - mutate.REQUIRED) * len(drawn)
    for file in {file for file, *_ in listed}:
        possible = {each.key for _, each in mutation_draw.mutations((mutate.ROOT / file).read_text(encoding="utf-8"), file)}
        assert {key for key in listed if key[0] == file} <= possible
    assert all(listed.values())
