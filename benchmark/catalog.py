"""Methods and tasks are found by folder: a file added is a method added. Names are read without importing anything."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from benchmark.errors import UserError, unknown

ROOT = Path(__file__).resolve().parent.parent
METHODS = ROOT / "benchmark" / "methods"
FOLDERS = {"method": METHODS, "two-sided method": METHODS / "crossmodal", "task": ROOT / "tasks"}

DAGGER = "†"
RECONSTRUCTION = f"{DAGGER} reconstruction: the paper's text was not available; see the method's file"
PARTS = ("SimCLR",)  # no rivals: trained as parts of other methods, or when asked for by name


@dataclass(frozen=True)
class Entry:
    """A method or task as its source file declares it."""

    name: str
    module: str
    summary: str
    variants: Mapping[str, Mapping[str, Any]]
    reconstruction: bool  # the file's docstring says so: the paper's text was not available

    @property
    def mark(self) -> str:
        """What tables show behind the name."""
        return DAGGER if self.reconstruction else ""


@functools.cache
def entries(kind: str) -> dict[str, Entry]:
    """Everything of a kind ("method", "two-sided method", "task") by name; the class of a file is the one named like the file."""
    found = {}
    for path in sorted(FOLDERS[kind].glob("[!_]*.py")):
        tree = ast.parse(path.read_text())
        reconstruction = "reconstruction" in (ast.get_docstring(tree) or "").lower()
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name.lower() == path.stem.replace("_", ""):
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                summary = (ast.get_docstring(node) or "").partition("\n")[0]
                found[node.name] = Entry(node.name, module, summary, _variants(node), reconstruction)
    return found


def _variants(node: ast.ClassDef) -> dict[str, dict]:
    for item in node.body:
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and item.target.id == "variants"
            and item.value
        ):
            return ast.literal_eval(item.value)
    return {}


def names(kind: str) -> list[str]:
    """Every name that may be asked for, variants of methods included."""
    return [name for entry in entries(kind).values() for name in (entry.name, *entry.variants)]


def mark(reference: str) -> str:
    """The mark of the method that a record names as `module.Class`; none for one from outside."""
    module = reference.rpartition(".")[0]
    found = [*entries("method").values(), *entries("two-sided method").values()]
    return next((entry.mark for entry in found if entry.module == module), "")


def load(kind: str, name: str) -> Any:
    """The class of a method or task, by its name or, from outside, as `package.module.Class`."""
    found = [*entries(kind).values(), *(entries("two-sided method").values() if kind == "method" else ())]
    owner = next((e for e in found if name == e.name or name in e.variants), None)
    if owner is None:  # any spelling of the name, as in the file's
        owner = next((e for e in found if name.lower() == e.name.lower()), None)
    module, _, attribute = (owner.module, "", owner.name) if owner else name.rpartition(".")
    if not module:
        raise unknown(kind, name, names(kind) + (names("two-sided method") if kind == "method" else []))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{kind} '{name}' cannot be imported: {error}") from None


def method(name: str, given: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """A method class and its full hyperparameters: defaults, then the variant's, then the `given` ones.

    Raises:
        UserError: unknown method; a hyperparameter that it does not have, or of the wrong type.
    """
    cls = load("method", name)
    variant = cls.variants.get(name, {}) if name != cls.__name__ else {}
    return cls, hyperparameters(cls, {**variant, **(given or {})})


def hyperparameters(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The signature of `__init__` is the schema: every hyperparameter of `cls` with its default or the given value."""
    parameters = [
        p for p in inspect.signature(cls).parameters.values() if p.name != "context" and p.default is not p.empty
    ]
    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    known = {
        p.name: p.default for p in parameters if p.kind is not p.KEYWORD_ONLY or p.name in vars(cls).get("space", {})
    }
    values = {}
    for key, value in given.items():
        if key not in known:
            raise unknown(f"hyperparameter of {cls.__name__}", key, known or ["(it has none)"])
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            raise UserError(f"{cls.__name__}: {key}: {error.errors()[0]['msg'].lower()}, got {value!r}") from None
    return {**known, **values}


def source_digest(cls: type) -> str:
    """Hash of the code that makes a method: its file and those of the methods it builds on, docstrings and comments aside."""
    path = inspect.getsourcefile(cls)
    if path is None:
        raise UserError(f"{cls.__name__} has no source file; put the method into a module")
    return hashlib.sha256("".join(_code(Path(path))).encode()).hexdigest()


def _code(path: Path) -> list[str]:
    """The code of a file, then of the method files that it imports."""
    tree, parts = ast.parse(path.read_text()), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmark.methods."):
            parts += _code(ROOT / ((node.module or "").replace(".", "/") + ".py"))
    return [ast.unparse(tree), *parts]


def argument_docs(cls: type) -> dict[str, str]:
    """Hyperparameter -> meaning, from the "Args:" part of the class's docstring; "a, b: text" speaks of both."""
    lines = (inspect.getdoc(cls) or "").partition("Args:\n")[2].splitlines()
    docs: dict[str, str] = {}
    for line in lines:
        text = line.strip()
        if line.startswith("    ") and not line.startswith("     ") and ":" in text:
            keys, _, meaning = text.partition(":")
            current = [key.strip() for key in keys.split(",")]
            docs.update(dict.fromkeys(current, meaning.strip()))
        elif line.startswith("     ") and docs:
            for key in current:
                docs[key] += " " + text
    return docs
