"""The source of Python's standard library: real code that is on every machine this runs on.

A module belongs to exactly one split, decided by a hash of its dotted name alone, so the split is the same on every
machine and for every Python version, and no function of a held-out module is ever trained on under another version.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sys
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_CHARS = 320  # of a built-in row's function, its docstring aside
MAX_PURPOSE = 160  # characters of its purpose

# the library's own tests; folders that are not the library; lib2to3 left Python in 3.13, idlelib is an application
_LEFT_OUT = {"test", "tests", "site-packages", "__pycache__", "lib2to3", "idlelib"}


@dataclass(frozen=True)
class Function:
    """A documented function: its module, name, signature text, one-paragraph purpose and source without docstring."""

    module: str
    name: str
    signature: str
    purpose: str
    source: str


def split_of(module: str) -> str:
    """`train`, `validation` (8%) or `test` (22%), by a hash of the top-level package's name."""
    bucket = int(hashlib.sha256(module.partition(".")[0].encode()).hexdigest()[:8], 16) % 100
    return "test" if bucket < 22 else "validation" if bucket < 30 else "train"


def modules() -> Iterator[tuple[str, str]]:
    """(dotted name, source) of the library's modules in name order, its own test suite left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(_files(root)):
        try:
            yield ".".join(path.relative_to(root).with_suffix("").parts), path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # a few modules are written in other encodings on purpose


def _files(root: Path) -> Iterator[Path]:
    def kept(name: str) -> bool:
        return name not in _LEFT_OUT and not name.startswith(("test_", "config-"))

    for folder, folders, names in os.walk(root):
        folders[:] = filter(kept, folders)
        yield from (Path(folder, name) for name in names if name.endswith(".py") and kept(name.removesuffix(".py")))


def parse(source: str) -> ast.Module | None:
    """The module's syntax tree, or None where the source is broken on purpose (the test suite has such files)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def body_keys(tree: ast.Module) -> Iterator[str]:
    """The `body_key` of every documented function of a module that may be as short as those of `functions`."""
    for node in _definitions(tree):
        if function := _read("", node):
            yield body_key(function.source)


def functions() -> list[Function]:
    """Every short documented function of the library, each body once."""
    found: dict[str, Function] = {}
    for module, source in modules():
        tree = parse(source)
        for node in _definitions(tree) if tree else ():
            if function := _read(module, node):
                fits = len(function.source) <= MAX_CHARS and len(function.purpose) <= MAX_PURPOSE
                if fits and "\n" in function.source:
                    found.setdefault(body_key(function.source), function)
    return list(found.values())


def body_key(source: str) -> str:
    """A function's body without its name and arguments: what makes two functions the same work."""
    return source.partition("\n")[2].strip()


def _definitions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Every `def`, in the order of `ast.walk` but without visiting expressions, which hold none: eight times faster."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, ast.FunctionDef):
            yield node
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, block, ()))


def _too_long(body: Iterable[ast.stmt]) -> bool:
    """Whether the names in `body` alone fill MAX_CHARS: true only of what is longer still once it is written out."""
    length = 0
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                length += len(node.id)
            elif isinstance(node, ast.Attribute):
                length += len(node.attr)
            if length > MAX_CHARS:
                return True
    return False


def _read(module: str, node: ast.FunctionDef) -> Function | None:
    doc = ast.get_docstring(node)
    if not doc or len(node.body) < 2 or _too_long(node.body[1:]):
        return None
    purpose = " ".join(doc.partition("\n\n")[0].split())
    if not purpose.isascii():
        return None
    signature = f"{node.name}({ast.unparse(node.args)})"
    bare = ast.FunctionDef(node.name, node.args, node.body[1:], [], node.returns, node.type_comment)
    bare.lineno = node.lineno
    if sys.version_info >= (3, 12):
        bare.type_params = node.type_params
    return Function(module, node.name, signature, purpose, ast.unparse(bare))
