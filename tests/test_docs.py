"""The documentation is complete: every page is in the nav, every link resolves."""

import importlib
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
AT_THE_ROOT = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]


def hook(name):
    """Imports a hook of mkdocs.yml as a module."""
    path = ROOT / "docs" / "hooks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"hook_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site():
    return hook("site")


@pytest.fixture(scope="module")
def api(site):
    return site.api_pages()


@pytest.fixture(scope="module")
def methods():
    return hook("method_pages")


def leaves(entries):
    """The pages in a part of the nav."""
    for entry in entries:
        target = entry if isinstance(entry, str) else next(iter(entry.values()))
        yield from [target] if isinstance(target, str) else leaves(target)


def test_every_page_is_in_the_nav(site, api, methods):
    written = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES]
    made = [*api, *methods.method_pages(), *hook("notebook_pages").notebook_pages()]
    pages = [*written, *site.COPIED, *made]
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    filled = [each for entry in nav for each in site.nav_entry(entry, pages)]
    assert sorted(leaves(filled)) == sorted(pages)


def test_an_entry_with_a_star_stands_for_the_pages_below_it(site):
    pages = ["a.md", "results.md", "results/x/y.md", "results/z.md"]
    assert site.nav_entry({"R": "results*"}, pages) == [{"R": pages[1:]}]
    assert site.nav_entry({"A": "a.md"}, pages) == [{"A": "a.md"}]
    nested = {"B": ["a.md", {"C": "results/*"}, "results.*"]}
    inside = ["a.md", {"C": pages[2:]}, "results.md"]
    assert site.nav_entry(nested, pages) == [{"B": inside}]


def test_every_method_has_a_page(methods):
    from experiments.trainer import optimizers
    from lorax import adapters, inits

    pages = {name.removeprefix("methods/") for name in methods.method_pages()}
    plain = {"adamw", "sgd", "muon", "muon_factors"}  # of optax; "muon" is muon_factors
    # other tests of the same process may have registered methods of their own
    own = lambda made: made.__module__.split(".")[0] in ("lorax", "experiments")
    named = lambda room, made: {f"{room}/{k}.md" for k, v in made.items() if own(v)}
    wanted = named("adapters", adapters.REGISTRY)
    wanted |= named("inits", {k: init.make for k, init in inits.REGISTRY.items()})
    ready = {k: v for k, v in optimizers.READY.items() if k not in plain}
    wanted |= named("optim", ready)
    assert len(wanted) > 30
    assert wanted | {"optim/muon.md"} <= pages


def test_a_method_page_takes_what_is_written_elsewhere(methods):
    page = methods.method_pages()["methods/optim/lora_plus.md"]
    assert "| `ratio` | `16.0` | see `scale_by_lora_plus`. |" in page
    assert "[arXiv:2402.12354](https://arxiv.org/abs/2402.12354)" in page
    assert "](../../results/optimizers.md)" in page and "| LoRA+ |" in page
    assert "[lorax.optim.lora_plus]" in page
    here, _, published = page.partition("## In published comparisons")
    assert "at one rate of a" in published and "at one rate of a" not in here
    pissa = methods.method_pages()["methods/inits/pissa.md"]
    assert "| `iterations` | `None` |" in pissa and "`stats`" not in pissa


def test_every_equation_is_drawn_whole(methods):
    converter = pytest.importorskip("latex2mathml.converter", reason="of docs")
    for name, told in methods.methods().items():
        drawn = converter.convert(told["equation"])
        assert "\\" not in drawn, name  # otherwise it does not know a command


def test_every_equation_stands_in_the_api(methods):
    pytest.importorskip("griffe", reason="of docs")
    found = hook("docstrings").equations()
    assert len(found) == len(methods.methods()) - 1
    lora = ROOT / "lorax" / "adapters" / "lora.py"
    assert "sqrt" not in found[lora, "Lora"]
    for file, name in found:
        assert re.search(rf"^(def|class) {name}\b", file.read_text(), re.MULTILINE)


def test_one_name_is_not_found_in_another(methods):
    assert methods.named("LoRA", "LoRA, rank 8") and methods.named("LoRA+", "LoRA+")
    for other in ("LoRA+", "LoRA-GA", "AdaLoRA", "rsLoRA"):
        assert not methods.named("LoRA", other)


def test_a_notebook_is_a_page_with_its_outputs():
    pages = hook("notebook_pages")
    cell = {"cell_type": "code", "source": ["x\n", "y"], "outputs": []}
    shown = [
        {"output_type": "stream", "text": ["1\n", "2\n"]},
        {"output_type": "display_data", "data": {"image/png": "QUJD\n"}},
        {"output_type": "execute_result", "data": {"text/plain": "```"}},
        {"output_type": "display_data", "data": {"image/svg+xml": ["<svg/>"]}},
    ]
    told = {"cell_type": "markdown", "source": "# Title"}
    cells = [told, cell | {"outputs": shown}]
    text = "\n".join(pages.blocks({"cells": cells}))
    assert text.startswith("# Title\n") and "```python\nx\ny\n```" in text
    assert "```text\n1\n2\n```" in text and "````text\n```\n````" in text
    assert "(data:image/png;base64,QUJD)" in text
    assert "(data:image/svg+xml;base64,PHN2Zy8+)" in text


def test_equations_are_drawn_without_a_script():
    pytest.importorskip("latex2mathml", reason="needs the docs extra")
    drawn = hook("maths").on_page_content(
        '<div class="arithmatex">\\[a &lt; b\\]</div>'
        '<span class="arithmatex">\\(c\\)</span>',
        *[None] * 3,
    )
    assert drawn.count("<math") == 2 and 'display="block"' in drawn
    assert "&lt;" in drawn or "&#x0003C;" in drawn


def packages():
    folders = (path.parent for path in (ROOT / "lorax").glob("*/__init__.py"))
    return sorted(folder.name for folder in folders)


@pytest.mark.parametrize("name", ["lorax", "population", "scaling", "training"])
def test_modules_that_users_meet_have_a_page(api, name):
    assert f"api/{name}.md" in api


@pytest.mark.parametrize("name", packages())
def test_every_package_has_a_page_with_all_that_it_hands_on(api, name):
    page = api[f"api/{name}.md"].splitlines()
    package = importlib.import_module(f"lorax.{name}")
    for exported in getattr(package, "__all__", ()):
        own = f"lorax.{name}.{exported}"
        module = importlib.util.find_spec(own) if "." not in exported else None
        if module is None:
            assert f"::: {own}" in page


def test_the_front_door_is_a_page(api):
    page, front = api["api/lorax.md"], importlib.import_module("lorax")
    shown = set(re.findall(r"^::: lorax\.(\w+)$", page, re.M))
    # with pages of their own
    modules = {"analysis", "compose", "optim", "quantized", "scaling"}
    assert modules.isdisjoint(shown) and set(front.__all__) - modules <= shown


def test_what_a_page_names_is_there(api):
    for page, text in api.items():
        names = re.findall(r"^::: (\S+)$", text, re.M)
        assert names, page
        for name in names:
            parent, _, last = name.rpartition(".")
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(parent), last), name


def test_the_citation_is_of_this_version():
    lorax = importlib.import_module("lorax")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    needed = {"cff-version", "message", "title", "authors"}  # of the schema
    assert needed <= set(cited) and str(cited["cff-version"]) == "1.2.0"
    assert cited["version"] == lorax.__version__
    assert cited["license"] == "Apache-2.0" and cited["authors"][0]["name"]


def test_the_changelog_names_this_version():
    versions = re.findall(
        r"^## \[(\S+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert versions[0][0] == importlib.import_module("lorax").__version__
    assert re.fullmatch(r"unreleased|\d{4}-\d\d-\d\d", versions[0][1])


LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.S | re.M)


@pytest.mark.parametrize(
    "page", [*AT_THE_ROOT, *PAGES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_lead_somewhere(page):
    for target in LINK.findall(CODE.sub("", page.read_text())):
        path, _, anchor = target.partition("#")
        if ":" in path:
            continue
        there = page.parent / path if path else page
        assert there.resolve().is_relative_to(ROOT) and there.exists(), target
        if anchor and there.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", there.read_text(), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()) for h in headings]
            assert anchor in [slug.replace(" ", "-") for slug in slugs], target


def test_links_keep_their_meaning_in_the_site(site):
    class Files:
        def get_file_from_path(self, path):
            there = ("index.md", "pods.md", "results/plan.md", "notebooks/a.md")
            return path if path in there else None

    def page(uri):
        file = type("File", (), {"src_uri": uri})
        return type("Page", (), {"file": file})

    def turned(uri, text):
        return site.on_page_markdown(text, page(uri), None, Files())

    assert turned("index.md", "[a](results/plan.md#x)") == "[a](results/plan.md#x)"
    assert turned("CHANGELOG.md", "[a](docs/pods.md)") == "[a](pods.md)"
    assert turned("index.md", "[a](../notebooks/a.ipynb)") == "[a](notebooks/a.md)"
    assert turned("notebooks/a.md", "[a](../docs/pods.md)") == "[a](../pods.md)"
    assert turned("results/plan.md", "[a](../pods.md)") == "[a](../pods.md)"
    assert turned("results/plan.md", "[a](../../README.md)") == "a"
    assert turned("pods.md", "see [a](../setup.py)!") == "see a!"  # not in the site
    assert turned("pods.md", "[a](https://b.org/c.md)") == "[a](https://b.org/c.md)"


def test_a_name_of_the_api_is_a_link_to_it(site):
    link = "[`lorax.adapt`][lorax.adapt]"
    assert site.linked("a `lorax.adapt`, b") == f"a {link}, b"
    assert site.linked("`lorax.adapt(fn)`") == "[`lorax.adapt(fn)`][lorax.adapt]"
    for plain in ("`lorax.nothing`", "[`lorax.adapt`](a.md)", "`adapt`", "lorax.adapt"):
        assert site.linked(plain) == plain
    code = "```python\n`lorax.adapt`\n```\n    `lorax.adapt`\n"
    assert site.linked(code + "`lorax.adapt`") == code + link


def test_a_bare_table_has_a_title(site):
    told = site.titled("| a |", "results/two_words/table.md")
    assert told == "# Two words: the table\n\n| a |"
    assert site.titled("# A\n", "results/a/table.md") == "# A\n"


def test_the_site_builds_without_a_warning(tmp_path):
    for tool in ("mkdocs", "mkdocstrings", "material", "latex2mathml"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"no {tool}: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "-d", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    page = (tmp_path / "site" / "api" / "optim.html").read_text()
    assert 'id="lorax.optim.lora_plus"' in page
    assert 'href="https://arxiv.org/abs/2402.12354">arXiv:2402.12354<' in page
    assert 'href="#lorax.optim.lora_plus"' in page  # from the table of names
    page = (tmp_path / "site" / "methods" / "adapters" / "dora.html").read_text()
    assert "<math" in page and "arithmatex" not in page
    quickstart = (tmp_path / "site" / "results" / "quickstart.html").read_text()
    assert "curves.svg#only-light" in quickstart and "<picture" not in quickstart
