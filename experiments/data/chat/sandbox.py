"""A jinja2 sandbox for chat templates: programs that come with a checkpoint.

A template is a stranger's code. jinja2's immutable sandbox keeps it away from Python's
internals; what is added here keeps it from running or growing without end:

- every loop iteration, every call and every filter checks the time;
- every printed value counts towards the size of the output, whatever becomes of it, and
  so does the text in the body of a loop or a macro, each time it runs;
- the arguments and results of operators, calls and filters are bounded, so that no
  single step between two checks takes long.

All of this happens on jinja2's own syntax tree, in the thread that renders: no signals,
no processes, no tracing. It stops broken or careless templates, and the known tricks;
for templates that may be hostile, use a process with limited memory.
"""

import datetime
import functools
import json
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from experiments.data.chat import limits


def compile_template(source: str, begin: str, end: str) -> jinja2.Template:
    """Compiles a template; render it inside `limited`.

    Args:
      source: the template.
      begin: printed where a `{% generation %}` block begins.
      end: printed where it ends.

    Raises:
      jinja2.TemplateError: it is not a valid template.
    """
    environment = _Environment(begin, end)
    tree = environment.parse(source)
    _instrument(tree, environment)
    return environment.template_class.from_code(
        environment, environment.compile(tree), environment.make_globals(None)
    )


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with transformers' names and with limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, begin: str, end: str) -> None:
        super().__init__(
            trim_blocks=True,  # as in transformers
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=_printed,
        )
        self.generation_marks = (begin, end)
        self.bounded = limits.bounded
        self.spend = limits.spend
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise, strftime_now=_now)
        self.filters.update(tojson=_tojson, join=_join)  # theirs escape HTML
        filters: dict[str, Any] = self.filters
        tests: dict[str, Any] = self.tests
        filters.update({name: _checked(f, exempt=1) for name, f in filters.items()})
        tests.update({name: _checked(f, exempt=99) for name, f in tests.items()})

    def call(  # noqa: D102 (jinja2's hook)
        __self,  # noqa: N805 (any keyword may be the template's)
        __context: jinja2.runtime.Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        name = getattr(__obj, "__name__", "")
        receiver = getattr(__obj, "__self__", None)
        if name == "join" and isinstance(receiver, str) and args:
            args = (limits.pieces(args[0], receiver), *args[1:])
        limits.check_arguments(name, (receiver, *args), kwargs)
        return limits.bounded(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:  # noqa: D102 (jinja2's hook)
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> Any:
            limits.check_arguments("format", (value.__self__, *args), kwargs)
            return wrapped(*args, **kwargs)

        return formatted

    def call_binop(  # noqa: D102 (jinja2's hook)
        self,
        context: jinja2.runtime.Context,
        operator: str,
        left: Any,
        right: Any,
    ) -> Any:
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, int) and not isinstance(other, int | float):
                    limits.bound(max(0, one) * limits.size(other), "a repetition")
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            limits.bound(left.bit_length() * abs(right), "a power")
        elif operator == "%" and isinstance(left, str):
            limits.check_arguments("format", (left, right), {})
        limits.spend(0)
        return limits.bounded(super().call_binop(context, operator, left, right))


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` .. `{% endgeneration %}`: what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's protocol)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Parses the block into a call of `_mark` with the body as its caller."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        begin, end = self.environment.generation_marks  # type: ignore[attr-defined]
        return f"{begin}{caller()}{end}"


def _instrument(tree: jinja2.nodes.Template, environment: jinja2.Environment) -> None:
    """Adds the checks of time and sizes to the syntax tree."""
    nodes = jinja2.nodes
    for reference in tree.find_all(nodes.NSRef):
        if reference.attr.startswith("_"):
            raise jinja2.TemplateSyntaxError(
                f"a namespace has no attribute {reference.attr!r}", reference.lineno
            )
    repeated: list[Any] = list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)))
    for node in repeated:
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_call("spend", nodes.Const(text))))
    for concat in list(tree.find_all(nodes.Concat)):
        # the node itself becomes the checked one, around a copy of the original
        inner = nodes.Concat([_call("bounded", node) for node in concat.nodes])
        concat.nodes = [_call("bounded", inner)]
    tree.set_environment(environment)
    tree.set_lineno(1)  # for the added nodes; the others keep theirs


def _call(name: str, argument: jinja2.nodes.Expr) -> jinja2.nodes.Expr:
    """Returns a call of an attribute of the environment."""
    function = jinja2.nodes.EnvironmentAttribute(name)
    return jinja2.nodes.Call(function, [argument], [], None, None)


def _printed(value: Any) -> Any:
    """Counts what `{{ .. }}` prints, and passes it on."""
    limits.spend(limits.size(limits.bounded(value)))
    return value


# What jinja2 itself passes to filters, before their first argument.
PASSED = (
    jinja2.Environment,
    jinja2.nodes.EvalContext,
    jinja2.runtime.Context,
)


def _checked(function: Callable[..., Any], exempt: int) -> Callable[..., Any]:
    """Wraps a filter or test to check the time, its arguments and its result."""

    @functools.wraps(function)  # keeps jinja2's mark of what is passed in
    def checked(*args: Any, **kwargs: Any) -> Any:
        name = getattr(function, "__name__", "").removeprefix("do_")
        given = [value for value in args if not isinstance(value, PASSED)]
        limits.check_arguments(name, given, kwargs, exempt)
        return limits.bounded(function(*args, **kwargs))

    return checked


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment,
    value: Any,
    d: str = "",
    attribute: str | int | None = None,
) -> str:
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    return str(d).join(limits.pieces(value, str(d)))


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
