"""A page for each method: a hook of mkdocs.

The hand-written part is in `docs/methods/*.yml`: how the method is called, its
equation, when to use it. The derivation, the options and the paper come from the
docstrings, and the measurements from `docs/methods.md`, so nothing is written twice.
"""

from __future__ import annotations

import ast
import functools
import inspect
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import yaml

DOCS = pathlib.Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
TITLE = re.compile(r"^([A-Z]\w+):$", re.MULTILINE)
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
LINK = re.compile(r"\]\((?!https?:|#)")
PUBLISHED = "## Reading published comparisons"
LEAD = re.compile(r"^- \*\*(.+?)\*\*.*(?:\n(?!- |#|\|).+)*", re.MULTILINE)


def methods() -> dict[str, dict[str, Any]]:
    """{"optim/muon": what is written about it}, in the order of the files."""
    return {
        f"{path.stem}/{key}": {"found": [told["name"]]} | told
        for path in sorted((DOCS / "methods").glob("*.yml"))
        for key, told in yaml.safe_load(path.read_text(encoding="utf-8")).items()
    }


def source(name: str, told: dict[str, Any]) -> pathlib.Path:
    """The module of a method."""
    folder, _, key = name.partition("/")
    own = f"lorax/{folder}/{'_' if folder == 'optim' else ''}{key}.py"
    return ROOT / told.get("module", own)


def sections(docstring: str) -> dict[str, str]:
    """{title: text} of a Google docstring; text before the first has the title ""."""
    found, title = {}, ""
    for i, part in enumerate(TITLE.split(inspect.cleandoc(docstring))):
        if i % 2:
            title = part
        else:
            found[title] = inspect.cleandoc(part) if title else part.rstrip()
    return found


def arguments(text: str) -> dict[str, str]:
    """{name: description} of the section `Args`."""
    parts = re.split(r"^(\w+): ", text, flags=re.MULTILINE)[1:]
    told = [" ".join(each.split()) for each in parts[1::2]]
    return dict(zip(parts[::2], told, strict=True))


def defaults(function: ast.FunctionDef) -> dict[str, str]:
    """{argument: its default as code}, "" for one without a default."""
    spec = function.args
    rest = len(spec.args) - len(spec.defaults)
    values = [*[None] * rest, *spec.defaults, *spec.kw_defaults]
    names = [argument.arg for argument in [*spec.args, *spec.kwonlyargs]]
    texts = [ast.unparse(value) if value else "" for value in values]
    return dict(zip(names, texts, strict=True))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def parameters(body: list[ast.stmt], function: str) -> str:
    """A table of a function's arguments and defaults, "" if it does not exist."""
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            told = arguments(sections(ast.get_docstring(node) or "").get("Args", ""))
            rows = [
                [f"`{name}`", f"`{value}`" if value else "", told.get(name, "")]
                for name, value in defaults(node).items()
            ]
            return table(["argument", "default", "meaning"], rows)
    return ""


def options(body: list[ast.stmt], function: str) -> str:
    """What a target's `options` may set: OPTIONS, and what the docstring says."""
    rows, told = [], ""
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPTIONS":
            assert isinstance(node.value, ast.Dict)
            names = [ast.literal_eval(key) for key in node.value.keys if key]
            values = map(ast.unparse, node.value.values)
            rows = [[f"`{k}`", f"`{v}`"] for k, v in zip(names, values, strict=True)]
        if isinstance(node, ast.FunctionDef) and node.name == function:
            docstring = sections(ast.get_docstring(node) or "")
            told = arguments(docstring.get("Args", "")).get("target", "")
    if not rows:
        return ""
    said = f"\nOf the target: {told}\n" if told else ""
    return table(["option", "default"], rows) + said


def symbol(name: str, body: list[ast.stmt], told: dict[str, Any]) -> str:
    """The dotted name under which the API has a method."""
    folder, _, key = name.partition("/")
    if folder == "adapters":
        classes = [n for n in body if isinstance(n, ast.ClassDef) and n.decorator_list]
        return f"lorax.adapters.{classes[-1].name}"
    if "module" in told and folder == "inits":
        return f"lorax.{key}"
    own = told.get("function", key)
    return f"lorax.inits.{key}.{key}" if folder == "inits" else f"lorax.optim.{own}"


@functools.cache
def compared() -> str:
    """The text of `docs/methods.md`."""
    return (DOCS / "methods.md").read_text(encoding="utf-8")


def named(name: str, text: str) -> bool:
    """Whether a text names this method, not one whose name merely contains it."""
    return bool(re.search(rf"(?<![\w+-]){re.escape(name)}(?![\w+-])", text))


def tables() -> Iterator[list[str]]:
    """The tables of `docs/methods.md`, each by its lines."""
    for found in re.finditer(r"(?:^\|.*\n)+", compared(), re.MULTILINE):
        yield found[0].splitlines()


def measured(names: list[str]) -> Iterator[str]:
    """The rows and paragraphs of `docs/methods.md` on what was measured of a method."""
    for head, rule, *rows in tables():
        own = [row for row in rows if any(named(n, row.split("|")[1]) for n in names)]
        if own:
            yield "\n".join([head, rule, *own]) + "\n"
    yield from paragraphs(names, compared().partition(PUBLISHED)[0])


def paragraphs(names: list[str], text: str) -> Iterator[str]:
    """The paragraphs that begin with the name of a method."""
    for match in LEAD.finditer(text):
        if any(named(name, match[1]) for name in names):
            yield match[0] + "\n"


def declared(key: str) -> str:
    """What `docs/methods.md` says about a parametrisation's parameters and defaults."""
    for head, rule, *rows in tables():
        for row in rows:
            if row.startswith(f'| `"{key}"`'):
                return LINK.sub("](../../", "\n".join([head, rule, row])) + "\n"
    return ""


def settings(name: str, told: dict[str, Any], body: list[ast.stmt]) -> str:
    """The section on a method's options, "" if it has none."""
    folder, _, key = name.partition("/")
    if folder == "optim" or "function" in told:
        found = parameters(body, told.get("function", key))
    else:
        found = "\n".join(filter(None, [options(body, key), declared(key)]))
    return f"## Options\n\n{found}" if found else ""


def page(name: str, told: dict[str, Any]) -> str:
    """Markdown of one method."""
    module = ast.parse(source(name, told).read_text(encoding="utf-8"))
    docstring = sections(ast.get_docstring(module) or "")
    prose = docstring[""].partition("\n")[2].strip("\n")
    found = told.get("result") or "\n".join(measured(told["found"]))
    elsewhere = "\n".join(paragraphs(told["found"], compared().partition(PUBLISHED)[2]))
    api = symbol(name, module.body, told)
    papers = told.get("paper", docstring.get("References", ""))
    parts = [
        f"# {told['name']}\n\n{told['when']}\n",
        f"$$\n{told['equation']}\n$$\n",
        f"```text\n{told['use']}\n```\n",
        f"## How it works\n\n{prose}\n" if prose else "",
        "## What was found here\n",
        LINK.sub("](../../", found or "Not compared here.\n"),
        "How methods were compared: [which method when](../../methods.md).\n",
        f"## In published comparisons\n\n{elsewhere}" if elsewhere else "",
        settings(name, told, module.body),
        f"## Reference\n\nIn the API: [`{api}`][{api}].\n",
        ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", papers),
    ]
    return "\n".join(part for part in parts if part)


def method_pages() -> dict[str, str]:
    """{page: Markdown} of every method."""
    return {f"methods/{name}.md": page(name, told) for name, told in methods().items()}


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages."""
    from mkdocs.structure.files import File

    for uri, text in method_pages().items():
        files.append(File.generated(config, uri, content=text))
    return files
