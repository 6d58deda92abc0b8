"""Every small change that could be made to dpt/, and some of them drawn by a fixed seed: what `make mutate` tries besides the kernels'.

They are found in the syntax tree and made in the text, so that all else of a file stays as it is. A statement gives at most one of each
kind, or its tables would be most of the draw. Which are drawn depends on their function and their line alone, neither on the file nor on
the place in it: a mutation stays drawn while other code is changed or moved.

mutmut and cosmic-ray do not suit: neither draws by a seed nor has tests for each part, mutmut leaves alone what stands outside of
functions, and cosmic-ray changes the files in place.
"""

from __future__ import annotations

import ast
import bisect
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OPERATORS = {  # class of the syntax tree -> kind, the operator as it is written, and what it becomes
    ast.Lt: ("comparison", "<", "<="),
    ast.LtE: ("comparison", "<=", "<"),
    ast.Gt: ("comparison", ">", ">="),
    ast.GtE: ("comparison", ">=", ">"),
    ast.Eq: ("comparison", "==", "!="),
    ast.NotEq: ("comparison", "!=", "=="),
    ast.In: ("comparison", "in", "not in"),
    ast.NotIn: ("comparison", "not in", "in"),
    ast.Is: ("comparison", "is", "is not"),
    ast.IsNot: ("comparison", "is not", "is"),
    ast.Add: ("arithmetic", "+", "-"),
    ast.Sub: ("arithmetic", "-", "+"),
    ast.Mult: ("arithmetic", "*", "/"),
    ast.Div: ("arithmetic", "/", "*"),
    ast.FloorDiv: ("arithmetic", "//", "*"),
    ast.Mod: ("arithmetic", "%", "+"),
    ast.Pow: ("arithmetic", "**", "*"),
    ast.And: ("condition", "and", "or"),
    ast.Or: ("condition", "or", "and"),
}
KINDS = ("comparison", "arithmetic", "number", "text", "flag", "condition")
OPPOSITES = (ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot)  # what these become is already the whole condition turned over
TESTED = (ast.If, ast.While, ast.IfExp, ast.Assert)  # nodes with a condition; so has a comprehension, several
WORDS = re.compile(r"[\w.,-]+")  # texts that a program reads; others are for people
FOR_PEOPLE = {"help", "prog", "desc", "unit", "metavar", "label", "title", "description"}  # keywords whose texts are for people


@dataclass(frozen=True)
class Mutation:
    """One change to a file: the text of [start, end) becomes `new`."""

    kind: str
    file: str  # from the root of the repository
    function: str  # with its classes; "" outside of any
    number: int  # of the line
    line: str  # where the change begins, stripped, before it and after it
    becomes: str
    start: int
    end: int
    new: str

    def made(self, source: str) -> str:
        """The file's text with the change made."""
        return source[: self.start] + self.new + source[self.end :]

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What it is recognised by while code elsewhere changes."""
        return self.file, self.function, self.line, self.becomes

    def rank(self, seed: int) -> str:
        """Its place in a draw: those of the smallest are drawn."""
        return hashlib.sha256("\n".join((str(seed), self.kind, self.function, self.line, self.becomes)).encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.file}:{self.number} {self.function}: {self.line}  ->  {self.becomes}"


def draw(mutations: list[Mutation], counts: dict[str, int], seed: int) -> list[Mutation]:
    """So many of each kind, in the order of the files."""
    ranked = sorted(mutations, key=lambda mutation: (mutation.rank(seed), mutation.file, mutation.start))
    drawn = [mutation for kind in KINDS for mutation in [each for each in ranked if each.kind == kind][: counts.get(kind, 0)]]
    return sorted(drawn, key=lambda mutation: (mutation.file, mutation.start))


def candidates(root: Path, files: list[Path], seed: int) -> list[Mutation]:
    """Of each statement of the files, the mutation of each kind that the seed gives the smallest rank."""
    first: dict[tuple, Mutation] = {}
    for file in files:
        for statement, mutation in mutations(file.read_text(encoding="utf-8"), file.relative_to(root).as_posix()):
            key = (mutation.file, id(statement), mutation.kind)
            first[key] = min(first.get(key, mutation), mutation, key=lambda each: each.rank(seed))
    return list(first.values())


def mutations(source: str, file: str) -> Iterator[tuple[ast.stmt, Mutation]]:
    """All mutations of a file, each with the statement it is part of.

    Left out are annotations, texts for people, what stands in f-strings (before Python 3.12 its place is not known), and the `strict` of a
    zip, which guards against mistakes and does nothing else.
    """
    tree = ast.parse(source)
    ends = [0]
    for line in source.splitlines(keepends=True):
        ends.append(ends[-1] + len(line))

    def place(row: int, column: int) -> int:
        """Where a syntax tree's position, in lines and bytes of UTF-8, is in the text."""
        line = source[ends[row - 1] : ends[row]]
        return ends[row - 1] + len(line.encode()[:column].decode())

    def span(node: ast.AST) -> tuple[int, int]:
        return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)

    def made(kind: str, function: str, start: int, end: int, new: str) -> Mutation:
        number = bisect.bisect_right(ends, start)
        first, last = ends[number - 1], ends[bisect.bisect_left(ends, end)]
        line, becomes = (text.partition("\n")[0].strip() for text in (source[first:last], source[first:start] + new + source[end:last]))
        return Mutation(kind, file, function, number, line, becomes, start, end, new)

    def between(left: ast.AST, right: ast.AST, operator: ast.AST, function: str) -> Iterator[Mutation]:
        """The operator that stands between two operands becomes another."""
        kind, old, new = OPERATORS.get(type(operator), (None, "", ""))
        if kind:
            start, end = span(left)[1], span(right)[0]
            found = re.compile(rf"(?<!\w){re.escape(old)}(?!\w)" if old.isalpha() else re.escape(old)).search(source, start, end)
            yield made(kind, function, found.start(), found.end(), new)

    def of_node(node: ast.AST, function: str) -> Iterator[Mutation]:
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
                yield from between(left, right, operator, function)
        elif isinstance(node, ast.BoolOp):
            yield from between(node.values[0], node.values[1], node.op, function)
        elif isinstance(node, ast.BinOp) and not any(map(is_text, (node.left, node.right))):  # paths and texts are no arithmetic
            yield from between(node.left, node.right, node.op, function)
        elif isinstance(node, ast.AugAssign) and not is_text(node.value):
            yield from between(node.target, node.value, node.op, function)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            start = span(node)[0]
            yield made("condition", function, start, start + len("not "), "")
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            yield made("flag", function, *span(node), str(not node.value))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            doubled = node.value * 2 if node.value else 1.0
            yield made("number", function, *span(node), repr(node.value + 1 if type(node.value) is int else doubled))
        for test in [node.test] if isinstance(node, TESTED) else node.ifs if isinstance(node, ast.comprehension) else []:
            start, end = span(test)
            if not (isinstance(test, ast.Compare) and isinstance(test.ops[0], OPPOSITES)):
                yield made("condition", function, start, end, f"not ({source[start:end]})")

    def texts(node: ast.AST, function: str) -> Iterator[Mutation]:
        """The texts below a node that a program reads: keys, keywords, and what is compared."""
        found: list[ast.AST | None] = []
        if isinstance(node, ast.Compare):
            found = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            found = node.keys
        elif isinstance(node, ast.Subscript):
            found = [node.slice]
        elif isinstance(node, ast.keyword) and node.arg not in FOR_PEOPLE:
            found = [node.value]
        for each in found:
            if is_text(each) and isinstance(each, ast.Constant) and WORDS.fullmatch(each.value):
                start, end = span(each)
                yield made("text", function, start, end, repr(each.value + "x").replace("'", '"'))

    def walk(node: ast.AST, function: str, statement: ast.stmt | None) -> Iterator[tuple[ast.stmt, Mutation]]:
        if isinstance(node, ast.stmt):
            statement = node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".lstrip(".")
        if statement is not None:
            yield from ((statement, each) for each in (*of_node(node, function), *texts(node, function)))
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if not isinstance(child, ast.AST) or name in ("annotation", "returns") or is_left_out(node, child):
                    continue
                yield from walk(child, function, statement)

    yield from walk(tree, "", None)


def is_text(node: ast.AST | None) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def is_left_out(parent: ast.AST, child: ast.AST) -> bool:
    if isinstance(child, ast.JoinedStr):
        return True
    if isinstance(child, ast.keyword) and child.arg == "strict":
        return isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "zip"
    return isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"
