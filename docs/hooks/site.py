"""Generated pages of the site: hooks of mkdocs.

The API has a page for each public package and module of `lorax`, made from what is in
the folder, so a new one is documented automatically. CONTRIBUTING and CHANGELOG live at
the root of the repository, where people look for them, and are copied in. Links keep
their meaning: a link to a page leads to that page, and a link to a file without a page
becomes plain text.
"""

from __future__ import annotations

import ast
import functools
import inspect
import pathlib
import posixpath
import re
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
COPIED = ("CONTRIBUTING.md", "CHANGELOG.md")
"""Pages from the root of the repository."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
SYMBOL = re.compile(r"(\[?)`(lorax(?:\.\w+)+)((?:\([^`]*\))?)`")
FENCED = re.compile(r"(^```.*?^```|^    [^\n]*$)", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">'
    r'\s*<img alt="([^"]+)"\s+src="([^"]+)".*?</picture>',
    re.DOTALL,
)


def parsed(module: pathlib.Path) -> ast.Module:
    """The syntax tree of a module; of a package, that of its `__init__.py`."""
    path = module / "__init__.py" if module.is_dir() else module
    return ast.parse(path.read_text(encoding="utf-8"))


def dotted(module: pathlib.Path) -> str:
    """The dotted name of a file, such as `lorax.inits.pissa`."""
    return ".".join(module.relative_to(ROOT).with_suffix("").parts)


def modules(folder: pathlib.Path) -> list[pathlib.Path]:
    """The public packages and modules of a package, sorted by name."""
    return [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith("_")
        if path.suffix == ".py" or (path / "__init__.py").exists()
    ]


def described(module: pathlib.Path) -> dict[str, str]:
    """{name: summary} of functions, classes and documented values, in order."""
    told, body = {}, parsed(module).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            told[node.name] = ast.get_docstring(node) or ""
        elif isinstance(node, ast.Assign | ast.AnnAssign) and is_text(after):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            told[ast.unparse(target)] = inspect.cleandoc(after.value.value)
    return {name: text.partition("\n\n")[0] for name, text in told.items()}


def defined(module: pathlib.Path) -> list[str]:
    """The public names of a module, in its order."""
    return [name for name in described(module) if not name.startswith("_")]


def is_text(node: ast.stmt | None) -> bool:
    """Whether a statement is the docstring of the one before it."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def imported(path: pathlib.Path) -> dict[str, list[str]]:
    """{lorax module: the names, other than modules, that a file imports}."""
    taken: dict[str, list[str]] = {}
    for node in parsed(path).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorax"):
            file = ROOT.joinpath(*(node.module or "").split("."))
            names = [alias.name for alias in node.names]
            names = [n for n in names if not (file / n).exists()]
            names = [n for n in names if not (file / f"{n}.py").exists()]
            if names:
                taken[node.module or ""] = names
    return taken


def handed_on(package: pathlib.Path) -> dict[str, list[str]]:
    """{module: names} that a package imports from `lorax` to put in its `__all__`."""
    exported = [
        ast.literal_eval(node.value)
        for node in parsed(package).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    public = exported[0] if exported else []
    own = {
        module: [name for name in names if name in public]
        for module, names in imported(package).items()
    }
    return {module: names for module, names in own.items() if names}


def title(module: pathlib.Path) -> str:
    """The first line of a module's docstring, up to a colon or full stop."""
    line = (ast.get_docstring(parsed(module)) or module.stem).splitlines()[0]
    return re.split(r"[:.](?:\s|$)", line)[0]


@functools.cache
def known(module: pathlib.Path) -> dict[str, str]:
    """{name: summary} of what a module defines or imports from `lorax`."""
    told = {}
    for source, names in imported(module).items():
        there = known(file_of(source))
        told |= {name: there[name] for name in names if name in there}
    return told | described(module)


def summary(prefix: str, names: list[str], told: dict[str, str]) -> str:
    """A table of names, linked to their documentation below, with their summaries."""
    if not names:
        return ""
    rows = [
        f"| [`{name}`][{prefix}.{name}] | {' '.join(told.get(name, '').split())} |"
        for name in names
    ]
    return "\n".join(["| name | what it is |", "|---|---|", *rows]) + "\n"


def prose(name: str) -> str:
    """The directive for a module's docstring alone."""
    return (
        f"::: {name}\n    options:\n"
        "      {members: false, show_root_heading: false, show_root_toc_entry: false,"
        " show_source: false}\n"
    )


MEMBER = r"^::: (\S+)\n    options: {heading_level: 3}$"


def members(prefix: str, names: list[str]) -> list[str]:
    """A directive for each name, under a heading of the third level."""
    options = "    options: {heading_level: 3}\n"
    return [f"::: {prefix}.{name}\n{options}" for name in names]


def section(module: pathlib.Path, prefix: str, names: list[str]) -> list[str]:
    """A module's part of a page: its title, its docstring, and its names under prefix.

    A module that is public under its own name gets a table of its names; the names of
    other modules are in the table at the top of the page.
    """
    public = prefix == dotted(module)
    heading = f"`{prefix}`" if public else title(module)
    contents = [summary(prefix, names, described(module))] if public else []
    parts = [f"## {heading}\n", prose(dotted(module)), *contents]
    return parts + members(prefix, names)


def file_of(module: str) -> pathlib.Path:
    """The file, or the folder, of a dotted name."""
    path = ROOT.joinpath(*module.split("."))
    return path if path.is_dir() else path.with_suffix(".py")


def api_page(path: pathlib.Path) -> str:
    """Markdown of one package or module below `lorax`."""
    name, own = dotted(path), defined(path)
    taken = handed_on(path) if path.is_dir() else {}
    listed = [*own, *(each for names in taken.values() for each in names)]
    parts = [f"# {name}\n", prose(name), summary(name, listed, known(path))]
    parts += members(name, own)
    for module, names in taken.items():
        parts += section(file_of(module), name, names)
    # If a package re-exports names of its modules, those names are what is public;
    # otherwise the modules are.
    if path.is_dir() and path != ROOT / "lorax" and not taken:
        for module in modules(path):
            parts += section(module, dotted(module), defined(module))
    return "\n".join(parts)


def api_pages() -> dict[str, str]:
    """{page: Markdown}: `lorax` itself, then its packages and modules.

    A module whose names `lorax` re-exports is on that page and has none of its own.
    """
    front = ROOT / "lorax"
    taken = handed_on(front)
    pages = {"api/lorax.md": api_page(front)}
    for path in modules(front):
        if path.is_dir() or f"lorax.{path.stem}" not in taken:
            pages[f"api/{path.stem}.md"] = api_page(path)
    return pages


def nav_entry(entry: Any, pages: list[str]) -> list[Any]:
    """The pages of a nav entry: `x*` stands for all pages that begin with `x`."""
    if isinstance(entry, str):
        found = [page for page in pages if page.startswith(entry[:-1])]
        return found if entry.endswith("*") else [entry]
    ((title, target),) = entry.items()
    inside = target if isinstance(target, list) else [target]
    filled = [each for one in inside for each in nav_entry(one, pages)]
    single = isinstance(target, str) and not target.endswith("*")
    return [{title: target if single else filled}]


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages, then fills the nav from all pages."""
    from mkdocs.structure.files import File

    for page in COPIED:
        text = (ROOT / page).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for page, text in api_pages().items():
        files.append(File.generated(config, page, content=text))
    written = [file.src_uri for file in files.documentation_pages()]
    config.nav = [each for entry in config.nav for each in nav_entry(entry, written)]
    return files


@functools.cache
def symbols() -> frozenset[str]:
    """The dotted names that the API documents, without modules."""
    pages = "\n".join(api_pages().values())
    return frozenset(re.findall(MEMBER, pages, re.MULTILINE))


def linked(text: str) -> str:
    """Makes each `lorax.name` in the text of a page a link to the API."""

    def link(match: re.Match[str]) -> str:
        name = match[2]
        found = name in symbols() and not match[1]
        return f"[`{match[2]}{match[3]}`][{name}]" if found else match[0]

    parts = FENCED.split(text)
    return "".join(
        part if i % 2 else SYMBOL.sub(link, part) for i, part in enumerate(parts)
    )


def in_site(source: str) -> str:
    """The page or file of the site that is made from a file of the repository."""
    page = source.removeprefix("docs/")
    return re.sub(r"^(notebooks/.*)\.ipynb$", r"\1.md", page)


def titled(text: str, uri: str) -> str:
    """A page with a title: a bare table is named after its folder."""
    if text.startswith("|") or text.startswith("## "):
        folder = posixpath.basename(posixpath.dirname(uri)).replace("_", " ")
        return f"# {folder.capitalize()}: the table\n\n{text}"
    return text


def on_page_markdown(text: str, page: Any, config: Any, files: Any) -> str:
    """Turns links, relative to the repository, into links within the site.

    A `<picture>` with a figure for dark pages becomes both figures; the theme shows the
    one that suits the reader's colour scheme.
    """
    del config
    uri = page.file.src_uri
    at_the_root = uri in COPIED or uri.startswith("notebooks/")
    home = posixpath.dirname(uri if at_the_root else f"docs/{uri}")

    def follow(match: re.Match[str]) -> str:
        image, label, target, anchor = match.groups(default="")
        if ":" in target:
            return match[0]
        site = in_site(posixpath.normpath(posixpath.join(home, target)))
        if files.get_file_from_path(site) is None:
            return label
        site = posixpath.relpath(site, posixpath.dirname(uri) or ".")
        return f"{image}[{label}]({site}{anchor})"

    text = PICTURE.sub(r"![\2](\3#only-light)![\2](\1#only-dark)", titled(text, uri))
    return LINK.sub(follow, linked(text) if not uri.startswith("api/") else text)
