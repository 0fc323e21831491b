"""Pages of the site that nobody writes: hooks of mkdocs.

The API has a page for each public package and module of `lorax`, made from what is in
the folder, so a new one is documented by being there. README, CONTRIBUTING and
CHANGELOG stand at the root of the repository, where people look for them, and are
copied in. Links keep their meaning: what leads to a page leads to that page, and what
leads to a file that is no page is left as text.
"""

from __future__ import annotations

import ast
import pathlib
import posixpath
import re
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
COPIED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
"""Pages from the root of the repository, and what they are in the site."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def parsed(module: pathlib.Path) -> ast.Module:
    """The syntax tree of a module; of a package, that of its `__init__.py`."""
    path = module / "__init__.py" if module.is_dir() else module
    return ast.parse(path.read_text(encoding="utf-8"))


def dotted(module: pathlib.Path) -> str:
    """`lorax.inits.pissa` of its file."""
    return ".".join(module.relative_to(ROOT).with_suffix("").parts)


def modules(folder: pathlib.Path) -> list[pathlib.Path]:
    """The public packages and modules in a package, by name."""
    return [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith("_")
        if path.suffix == ".py" or (path / "__init__.py").exists()
    ]


def defined(module: pathlib.Path) -> list[str]:
    """The public functions, classes and documented values of a module, in its order."""
    names, body = [], parsed(module).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and is_text(after):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            names.append(ast.unparse(target))
    return [name for name in names if not name.startswith("_")]


def is_text(node: ast.stmt | None) -> bool:
    """Whether a statement is the docstring of what stands before it."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def handed_on(package: pathlib.Path) -> dict[str, list[str]]:
    """{module: names} that a package imports from `lorax` to put in its `__all__`."""
    taken: dict[str, list[str]] = {}
    body = parsed(package).body
    exported = [
        ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    for node in body:
        if isinstance(node, ast.ImportFrom):
            file = ROOT.joinpath(*(node.module or "").split("."))
            names = [alias.name for alias in node.names]
            names = [name for name in names if exported and name in exported[0]]
            # What is a module has a page, or a section, of its own.
            names = [n for n in names if not (file / n).exists()]
            names = [n for n in names if not (file / f"{n}.py").exists()]
            if names:
                taken[node.module or ""] = names
    return taken


def title(module: pathlib.Path) -> str:
    """What comes before the colon, or the stop, of the module's first line."""
    line = (ast.get_docstring(parsed(module)) or module.stem).splitlines()[0]
    return re.split(r"[:.](?:\s|$)", line)[0]


def prose(name: str) -> str:
    """The directive for the docstring of a module alone."""
    return (
        f"::: {name}\n    options:\n"
        "      {members: false, show_root_heading: false, show_root_toc_entry: false,"
        " show_source: false}\n"
    )


def members(prefix: str, names: list[str]) -> list[str]:
    """A directive for each name, under a heading of the third level."""
    options = "    options: {heading_level: 3}\n"
    return [f"::: {prefix}.{name}\n{options}" for name in names]


def section(module: pathlib.Path, prefix: str, names: list[str]) -> list[str]:
    """A module of a page: its title, its docstring, and names as found below prefix."""
    public = prefix == dotted(module)
    heading = f"`{prefix}`" if public else title(module)
    return [f"## {heading}\n", prose(dotted(module)), *members(prefix, names)]


def file_of(module: str) -> pathlib.Path:
    """The file, or the folder, of a dotted name."""
    path = ROOT.joinpath(*module.split("."))
    return path if path.is_dir() else path.with_suffix(".py")


def api_page(path: pathlib.Path) -> str:
    """Markdown of one package or module below `lorax`."""
    name = dotted(path)
    parts = [f"# {name}\n", prose(name), *members(name, defined(path))]
    if path.is_dir():
        taken = handed_on(path)
        for module, names in taken.items():
            parts += section(file_of(module), name, names)
        # Where a package hands on the names of its modules, those are what is public.
        # Where it does not, the modules are.
        if path != ROOT / "lorax" and not taken:
            for module in modules(path):
                parts += section(module, dotted(module), defined(module))
    return "\n".join(parts)


def api_pages() -> dict[str, str]:
    """{page: Markdown}: the front door, then the packages and modules behind it.

    A module whose names the front door hands on is on its page and has none of its own.
    """
    front = ROOT / "lorax"
    taken = handed_on(front)
    pages = {"api/lorax.md": api_page(front)}
    for path in modules(front):
        if path.is_dir() or f"lorax.{path.stem}" not in taken:
            pages[f"api/{path.stem}.md"] = api_page(path)
    return pages


def nav_entry(entry: Any, pages: list[str]) -> Any:
    """An entry of the nav with `*` replaced by the pages that it stands for."""
    ((title, target),) = entry.items()
    if not (isinstance(target, str) and target.endswith("*")):
        return entry
    return {title: [page for page in pages if page.startswith(target[:-1])]}


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages, then fills the nav from all there are."""
    from mkdocs.structure.files import File

    for source, page in COPIED.items():
        if (ROOT / source).exists():
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=text))
    for page, text in api_pages().items():
        files.append(File.generated(config, page, content=text))
    written = sorted(file.src_uri for file in files.documentation_pages())
    config.nav = [nav_entry(entry, written) for entry in config.nav]
    return files


def on_page_markdown(text: str, page: Any, config: Any, files: Any) -> str:
    """Turns links, relative to the repository, into links within the site."""
    uri = page.file.src_uri
    back = {site: source for source, site in COPIED.items()}
    home = posixpath.dirname(back.get(uri, f"docs/{uri}"))

    def follow(match: re.Match[str]) -> str:
        image, label, target, anchor = match.groups(default="")
        if ":" in target:
            return match[0]
        source = posixpath.normpath(posixpath.join(home, target))
        site = COPIED.get(source, source.removeprefix("docs/"))
        if files.get_file_from_path(site) is None:
            return label
        site = posixpath.relpath(site, posixpath.dirname(uri) or ".")
        return f"{image}[{label}]({site}{anchor})"

    return LINK.sub(follow, text)
