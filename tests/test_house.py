"""House rules: imports point down, files are short, names are documented."""

import ast
import inspect
import pathlib
import re
import statistics

import pytest

import lorax

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "lorax").rglob("*.py"))
PROGRAMS = sorted((ROOT / "experiments").rglob("*.py"))
COMMAND = sorted((ROOT / "lorax_cli").glob("*.py"))
EVERYTHING = sorted(
    path
    for folder in ("lorax", "lorax_cli", "experiments", "configs", "tests")
    for path in (ROOT / folder).rglob("*.py")
)

# design.md, section 4, bottom first: a module imports only what stands before it
LAYERS = """
types untrusted registry quantized tree _checks _explicit _sweep _lapack linalg
adapters scaling
interpret
losses kernels targets selection quantization notices inits optim analysis sharding
attention models computed transform description activations calibration compose merging
compensation accumulation steps training population checkpoint interop
""".split()
# bottom first; the commands are above all of them
FLOORS = """
paired machine data generation tasks trainer pages reading recipes planning search
benchmarks studies
""".split()
COMMANDS = ROOT / "experiments"  # one file per command
CATALOGUE = COMMANDS / "studies" / "questions"  # one file per question
FORBIDDEN = (
    "absl argparse clu datasets experiments grain matplotlib ml_collections rich "
    "tensorboardX tensorflow tokenizers torch tqdm transformers wandb"
).split()


def name_of(path):
    """`lorax.inits.standard` of lorax/inits/standard.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top_level(tree):
    """Statements run on import: not those inside functions or TYPE_CHECKING."""
    for node in tree.body:
        if isinstance(node, ast.If | ast.Try):
            if "TYPE_CHECKING" not in ast.unparse(node):
                yield from ast.walk(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def imports(nodes):
    """The full names that import statements bring in."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = {name_of(path) for path in EVERYTHING}


def resolved(name):
    """The module that `from a.b import c` loads: a.b.c if it is one, else a.b."""
    return name if name in MODULES else name.rpartition(".")[0]


def parsed(path):
    return ast.parse(path.read_text())


def ids(paths):
    return pytest.mark.parametrize("path", paths, ids=[name_of(p) for p in paths])


@ids(LIBRARY)
def test_imports_point_down(path):
    if path == ROOT / "lorax" / "__init__.py":
        return
    own = name_of(path).split(".")[1]
    assert own in LAYERS, f"{own} has no layer: add it to design.md and to LAYERS"
    for name in imports(ast.walk(parsed(path))):
        other = resolved(name).split(".")
        if other[0] != "lorax" or other[1:2] == [own]:
            continue
        assert len(other) > 1, f"{name} goes through the front door, from inside"
        down = LAYERS.index(other[1]) < LAYERS.index(own)
        assert down, f"{own} imports {name}"


# lorax/interpret/README.md: rooms and modules of the walker, bottom first
ROOMS = """
program terms uses walker low_rank emitter recorder origins rules computed
""".split()


@ids([path for path in LIBRARY if name_of(path).startswith("lorax.interpret.")])
def test_rooms_of_the_walker_point_down(path):
    own = name_of(path).split(".")[2]
    for name in imports(ast.walk(parsed(path))):
        other = resolved(name).split(".")
        if other[:2] == ["lorax", "interpret"] and other[2:3] not in ([], [own]):
            down = ROOMS.index(other[2]) < ROOMS.index(own)
            assert down, f"{own} imports {name}"


@ids([path for path in PROGRAMS if path.parent != ROOT / "experiments"])
def test_floors_of_experiments(path):
    own = name_of(path).split(".")[1]
    assert own in FLOORS, f"{own} has no floor: add it to FLOORS"
    for name in imports(ast.walk(parsed(path))):
        other = resolved(name).split(".")
        if other[0] != "experiments" or other[1:2] in ([], [own]):
            continue
        assert other[1] in FLOORS, f"{own} imports the command {name}"
        assert FLOORS.index(other[1]) < FLOORS.index(own), f"{own} imports {name}"


def test_rooms_of_experiments_are_small_and_names_unique():
    modules = [path for path in PROGRAMS if path.name != "__init__.py"]
    for folder in {path.parent for path in modules} - {CATALOGUE, COMMANDS}:
        files = [path.name for path in modules if path.parent == folder]
        assert len(files) <= 10, f"{folder.relative_to(ROOT)}: {len(files)} files"
    names = [name_of(path).split(".")[-1] for path in PROGRAMS]
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice, f"two things of one name: {twice}"


@ids(LIBRARY)
def test_the_library_is_light(path):
    for name in imports(ast.walk(parsed(path))):
        assert name.split(".")[0] not in FORBIDDEN, name


@ids([p for p in EVERYTHING if p.parent.name != "tests"])
def test_only_public_jax(path):
    for name in imports(ast.walk(parsed(path))):
        assert "jax._src" not in name and "jaxlib" not in name, name
        own = path.relative_to(ROOT).parts[0]
        assert own == "tests" or not name.startswith("tests"), name
    private = re.findall(r"\bjax\.(?:\w+\.)*_[a-z]\w*", path.read_text())
    assert not private, private


def test_an_underscored_file_is_private_to_its_folder():
    """Like lorax/optim/_gram.py to lorax/optim, and lorax/_checks.py to lorax."""
    for path in LIBRARY:
        for name in imports(ast.walk(parsed(path))):
            parts = resolved(name).split(".")
            hidden = next((i for i, p in enumerate(parts) if p.startswith("_")), None)
            if hidden is not None and parts[0] == "lorax":
                folder = parts[:hidden]
                assert name_of(path).split(".")[:hidden] == folder, f"{path}: {name}"


def test_no_import_cycles():
    graph = {
        name_of(path): {resolved(name) for name in imports(top_level(parsed(path)))}
        & MODULES - {name_of(path)}
        for path in [*LIBRARY, *PROGRAMS]
    }
    # a package imports its children, and they import one another through it: ignore the
    # edge from a child to its own package, which is always loaded first
    graph = {
        name: {other for other in needs if not name.startswith(f"{other}.")}
        for name, needs in graph.items()
    }
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_, name])
        if name not in done:
            open_.append(name)
            for other in sorted(graph.get(name, ())):
                visit(other)
            done.add(open_.pop())

    for name in sorted(graph):
        visit(name)


@ids(EVERYTHING)
def test_files_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 400, f"{lines} lines: one concern per file, split it"


def test_the_median_file_is_shorter(record_property):
    sizes = [len(path.read_text().splitlines()) for path in LIBRARY]
    median = statistics.median(sizes)
    record_property("median_lines", median)
    assert median <= 220, f"median {median} lines"


def public(body, prefix=""):
    """(name, node) of public functions and classes, and of public methods."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_") and node.name != "__init__":
            continue
        yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from public(node.body, f"{node.name}.")


def inherited(node):
    """True for methods that a decorator documents elsewhere."""
    return any(
        ast.unparse(d) in ("nn.compact", "overload", "typing.overload")
        for d in getattr(node, "decorator_list", ())
    )


@ids([*LIBRARY, *PROGRAMS, *COMMAND])
def test_public_names_are_documented(path):
    module = parsed(path)
    assert ast.get_docstring(module), "the module has no docstring"
    bare = [
        name
        for name, node in public(module.body)
        if not ast.get_docstring(node) and not inherited(node)
        if name.rpartition(".")[2] != "__init__" or len(node.args.args) > 1
    ]
    assert not bare, f"no docstring: {bare}"


@ids([*LIBRARY, *PROGRAMS, *COMMAND])
def test_public_arguments_are_annotated(path):
    bare = []
    for name, node in public(parsed(path).body):
        if isinstance(node, ast.ClassDef):
            continue
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        args += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
        args = [a for a in args if a.arg not in ("self", "cls")]
        bare += [f"{name}({a.arg})" for a in args if a.annotation is None]
        if node.returns is None:
            bare.append(f"{name} -> ?")
    assert not bare, f"no type: {bare}"


def test_the_front_door():
    names = lorax.__all__
    assert len(names) <= 30 and sorted(names) == list(names)
    assert all(hasattr(lorax, name) for name in names)
    undocumented = [n for n in names if not inspect.getdoc(getattr(lorax, n))]
    assert undocumented in ([], ["Adapters"])  # an alias has no docstring
    files = {name_of(path).split(".")[-1] for path in LIBRARY}
    modules = {name for name in names if inspect.ismodule(getattr(lorax, name))}
    assert not files & (set(names) - modules), "a module has the name of a public name"


UNFINISHED = re.compile("TODO|FIXME|XXX|(?<!except )NotImplementedError")
MACHINE = re.compile(r"/(?:work|root|opt|home|Users)/\w")
IGNORE = re.compile(r"#\s*(?:type:\s*ignore(?!\[)|noqa(?!: ?[A-Z]))")
TEXT = [*EVERYTHING, *ROOT.glob("*.md"), *ROOT.glob("*.py"), *ROOT.glob("*.toml")]


@pytest.mark.parametrize(
    "path", sorted({*TEXT}), ids=lambda p: str(p.relative_to(ROOT))
)
def test_nothing_is_left_unfinished(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for rule in (UNFINISHED, MACHINE, IGNORE):
            if path != pathlib.Path(__file__):
                assert not rule.search(line), f"line {number}: {line.strip()}"


@ids([p for p in LIBRARY + PROGRAMS if p.parent.name != "adapters"])
def test_methods_are_not_told_apart_by_class_or_name(path):
    """Code above the parametrisations reads their declarations, so others can join."""
    text = path.read_text()
    names = "|".join(cls.__name__ for cls in lorax.adapters.REGISTRY.values())
    told = re.findall(rf"isinstance\([^)]*\b(?:{names})\b[^)]*\)", text)
    told += re.findall(r"\.adapter\s*[!=]=\s*\S+", text)
    assert not told, told


def test_actions_are_pinned_by_hash():
    """A tag can be moved to other code; a commit cannot."""
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    used = [u for f in files for u in re.findall(r"uses: *(.+)", f.read_text())]
    assert len(used) >= 4
    for action in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action), action
