"""Templates that loop, grow or reach for Python are each stopped in time."""

import time

import pytest

from experiments.data.chat import templates

pytest.importorskip("jinja2", reason="needs the interop extra: tokenizers, jinja2")

MESSAGES = [{"role": "user", "content": "hello"}]


def render(source, seconds=0.3, characters=200_000):
    return templates.ChatTemplate(
        source, "m/chat_template.jinja", {}, seconds, characters
    )


LONG = "{% set s = 'x' * 1000000 %}"
LOOPS = {
    "empty": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "filtered": "{% for a in range(99999) %}{% for b in range(999) if false %}"
    "{% endfor %}{% endfor %}",
    "recursive loop": "{% for a in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "recursive macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}"
    "{% endif %}{% endmacro %}{{ f(60) }}",
    "inside a set block": "{% set x %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endset %}",
    "filters": "{{ ([range(99999)] * 99999) | map('sum') | list }}",
    "tests": "{% set r = range(99999) | list %}"
    "{{ r | select('in', r) | list | length }}",
    "static text": "{% for a in range(99999) %}some text{% endfor %}",
    "static text in a macro": "{% macro m() %}" + "text" * 99 + "{% endmacro %}"
    "{% for a in range(99999) %}{% set x = m() %}{% endfor %}",
    "printed": "{% for a in range(99999) %}{{ messages[0].content }}{% endfor %}",
    "kept back": LONG + "{% set x %}{% for a in range(99999) %}{{ s }}{% endfor %}"
    "{% endset %}",
    "doubling": "{% set ns = namespace(s='ab') %}{% for a in range(60) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "adding": "{% set ns = namespace(s='ab') %}{% for a in range(60) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "nesting": "{% set ns = namespace(s=['ab']) %}{% for a in range(60) %}"
    "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "repeating": "{{ 'a' * 10000000000 }}",
    "power": "{{ 9 ** 99999999 }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "indent": "{{ messages | tojson(indent=1000000000) }}",
    "width": "{{ '%10000000000d' % 1 }}",
    "width by argument": "{{ '%*d' % (10000000000, 1) }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "format by argument": "{{ '{:>{}}'.format(1, 10000000000) }}",
    "replace": LONG + "{{ s.replace('x', s) }}",
    "join": LONG + "{{ ([s] * 2) | join(s) }}",
    "join method": LONG + "{{ s.join(['a', 'a', 'a']) }}",
    "joined attributes": "{{ ([{'a': 'x' * 9999}] * 9) | join(attribute='a') * 99 }}",
}


@pytest.mark.parametrize("source", LOOPS.values(), ids=list(LOOPS))
def test_it_is_stopped(source):
    began = time.monotonic()
    with pytest.raises(
        templates.ChatTemplateError,
        match="m/chat_template.jinja: the template was stopped",
    ):
        render(source).render(MESSAGES)
    assert time.monotonic() - began < 5  # a busy machine; 0.3 s is the limit


def test_the_reasons():
    with pytest.raises(
        templates.ChatTemplateError, match="more than 0.3 s: does it loop"
    ):
        render(LOOPS["empty"]).render(MESSAGES)
    with pytest.raises(templates.ChatTemplateError, match="more than 999 characters"):
        render(LOOPS["printed"], characters=999).render(MESSAGES)
    with pytest.raises(templates.ChatTemplateError, match="a number given to 'ljust'"):
        render(LOOPS["ljust"]).render(MESSAGES)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception.__globals__.items() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{% include 'secrets.txt' %}",
    "{{ lipsum(9) }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_python_is_out_of_reach(source):
    with pytest.raises(templates.ChatTemplateError, match="does not render this chat"):
        render(source).render(MESSAGES)


def test_a_namespace_has_no_private_attributes():
    with pytest.raises(templates.ChatTemplateError, match=r"no attribute '__class__'"):
        render("{% set ns = namespace() %}{% set ns.__class__ = 1 %}")


HARMLESS = [
    ("{{ 'a' * 3 ~ 2 ** 10 ~ 7 % 4 }}", "aaa10243"),
    ("{{ '%s-%02d' % ('a', 3) }}{{ '{:>3}|{{}}'.format('x') }}", "a-03  x|{}"),
    ("{{ messages | map(attribute='role') | join(', ') }}", "user"),
    ("{{ ', '.join(messages[0]) }}", "role, content"),
    ("{{ messages[0] | tojson }}", '{"role": "user", "content": "hello"}'),
    ("{{ {'t': 1700000000} | tojson }}", '{"t": 1700000000}'),
    ("{{ 1700000000 | string }}{{ dict(a=1700000000).a }}", "1700000000" * 2),
    ("{{ '<é>' | tojson }}", '"<é>"'),
    ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
     "01"),
    ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
     "{% endfor %}{{ ns.n }}", "1"),
    ("{{ strftime_now('%%') }}{{ 3 is divisibleby(3) }}{{ undefined }}", "%True"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "text"), HARMLESS)
def test_what_templates_do_still_works(source, text):
    assert render(source).render(MESSAGES).text == text


def test_a_long_document_passes():
    long = [{"role": "user", "content": "word " * 100_000}]
    template = templates.ChatTemplate(
        "{{ messages[0].content.replace('w', 'v') | trim ~ '.' }}", "x", {}
    )
    assert template.render(long).text == ("vord " * 100_000).strip() + "."
