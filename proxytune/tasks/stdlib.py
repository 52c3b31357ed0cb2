"""The source of Python's standard library: real code that is on every machine this runs on.

A module belongs to exactly one split, decided by a hash of its dotted name alone, so the split is the same on every
machine and for every Python version, and no function of a held-out module is ever trained on under another version.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FOREIGN = {"site-packages", "lib2to3", "__pycache__", "idlelib"}  # lib2to3 left Python in 3.13, idlelib is an application


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
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _FOREIGN & set(parts) or any(part.startswith("config-") for part in parts):
            continue
        if ({"test", "tests"} & set(parts) or any(part.startswith("test_") for part in parts)):
            continue
        try:
            yield ".".join(parts), path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # a few test modules are written in other encodings on purpose


def parse(source: str) -> ast.Module | None:
    """The module's syntax tree, or None where the source is broken on purpose (the test suite has such files)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return None


def body_keys(tree: ast.Module) -> Iterator[str]:
    """The `body_key` of every documented function of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (function := _read("", node)):
            yield body_key(function.source)


def functions(max_chars: int = 320, max_purpose: int = 160) -> list[Function]:
    """Every short documented function of the library, each body once."""
    found: dict[str, Function] = {}
    for module, source in modules():
        tree = parse(source)
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.FunctionDef) and (function := _read(module, node)):
                fits = len(function.source) <= max_chars and len(function.purpose) <= max_purpose
                if fits and "\n" in function.source:
                    found.setdefault(body_key(function.source), function)
    return list(found.values())


def body_key(source: str) -> str:
    """A function's body without its name and arguments: what makes two functions the same work."""
    return source.partition("\n")[2].strip()


def _read(module: str, node: ast.FunctionDef) -> Function | None:
    doc = ast.get_docstring(node)
    if not doc or len(node.body) < 2:
        return None
    purpose = " ".join(doc.partition("\n\n")[0].split())
    if not purpose.isascii():
        return None
    signature = f"{node.name}({ast.unparse(node.args)})"
    bare = ast.FunctionDef(node.name, node.args, node.body[1:], [], node.returns, node.type_comment)
    bare.lineno = node.lineno
    if hasattr(node, "type_params"):
        bare.type_params = node.type_params
    return Function(module, node.name, signature, purpose, ast.unparse(bare))
