"""Templates that mean harm are stopped, in bounded time and memory, with one clear line."""

import time
import tracemalloc

import pytest

from server.errors import OpenError, RequestError
from server.text.template import ChatTemplate

USER = [{"role": "user", "content": "hi"}]
# Lets a template pass the trial when it is opened, so that the rendering of a request is what is tested.
ARMED = "{% if messages[0].content == 'hi' %}"


def render(source: str) -> str:
    return ChatTemplate(ARMED + source + "{% endif %}").render(USER)


def grow(start: str, more: str) -> str:
    """A template that gives n.v, which begins as `start`, sixty times the value `more`."""
    return (
        f"{{% set n = namespace(v={start}) %}}"
        f"{{% for a in range(60) %}}{{% set n.v = {more} %}}{{% endfor %}}{{{{ n.v }}}}"
    )


LOOPS = [
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "{% for a in range(100000) %}{{ range(100000) | list | length }}{% endfor %}",
    "{% for a in range(100000) %}{{ range(100000) | map('string') | join | length }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% block b %}{% endblock %}{% macro f(n) %}{% if n %}{{ self.b() }}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "{% for a in [[1], [1]] recursive %}{{ loop([[1], [1]]) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    grow("(1, 2)", "(n.v, n.v)") + "{{ {n.v: 1} }}",
    grow("[1]", "[n.v, n.v]") + "{{ n.v == [n.v] }}",
    grow("[1]", "{'a': n.v, 'b': n.v}"),
    grow("[1]", "dict(a=n.v, b=n.v)"),
    "{% set n = namespace(v=[1]) %}{% macro f() %}{{ varargs | length }}{% set n.v = varargs %}{% endmacro %}"
    "{% for a in range(60) %}{{ f(n.v, n.v) }}{% endfor %}{{ n.v }}",
]

BOMBS = [
    "{{ 'a' * 10000000000 }}",
    "{{ 10000000000 * 'a' }}",
    "{{ [0] * 10000000000 }}",
    "{{ 2 ** 100000000000 }}",
    "{{ 10 ** (10 ** 10) }}",
    grow("3", "n.v * n.v"),
    grow("'ab'", "n.v + n.v"),
    grow("'ab'", "n.v ~ n.v"),
    "{% set n = namespace(v='ab') %}"
    "{% for a in range(60) %}{% set n.v %}{{ n.v }}{{ n.v }}{% endset %}{% endfor %}{{ n.v }}",
    grow("[1]", "n.v + n.v"),
    grow("'ab'", "n.v.replace('a', n.v)"),
    grow("'ab'", "n.v | replace('a', n.v)"),
    grow("'ab'", "n.v.join(['a', n.v, 'b'])"),
    grow("'ab'", "['a', n.v, n.v] | join(n.v)"),
    grow("'ab'", "'{0}{0}'.format(n.v)"),
    grow("'ab'", "'%s%s' % (n.v, n.v)"),
    grow("'ab'", "[n.v, n.v] | tojson"),
    "{% macro f(v, n) %}{{ f(v + v, n - 1) if n else v | length }}{% endmacro %}{{ f([1], 60) }}",
    "{% macro f(v, n) %}{{ f([v, v], n - 1) if n else v | length }}{% endmacro %}{{ f([1], 60) }}",
    grow("1", "namespace(a=n.v, b=n.v)") + "{{ 'x' * 10000000000 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ 'a'.center(1000000000) }}",
    "{{ ['a'.ljust][0](1000000000) }}",
    "{{ ('a' | attr('zfill'))(1000000000) }}",
    "{{ (5).to_bytes(1000000000) }}",
    "{{ 'a\\nb' | indent(1000000000) }}",
    "{{ {'a': 1} | tojson(indent=1000000000) }}",
    "{{ 1.5 | round(1000000000) }}",
    "{{ range(1000000000) | list }}",
    "{% for a in range(100000) %}{{ 'a' * 10000 }}{% endfor %}",
    "{% set s = 'ab' * 1000000 %}{% set n = namespace(l=[]) %}"
    "{% for a in range(1000) %}{% set n.l = n.l + [s[1:]] %}{% endfor %}",
    "{% set s = 'ab' * 1000000 %}{{ [s] * 100000 }}",
    "{% set s = 'ab' * 1000000 %}{{ ([s] * 100000) | string | length }}",
    "{% set s = 'ab' * 1000000 %}{{ {'k': [s] * 100000}.values() }}",
    "{% set s = 'ab' * 1000000 %}{{ ([s] * 100000) ~ '' }}",
]


def refused(source: str) -> RequestError:
    with pytest.raises(RequestError, match=r"^The model's chat template [^\n]+$") as caught:
        render(source)
    return caught.value


@pytest.mark.parametrize("source", LOOPS + BOMBS)
def test_it_ends_soon(source: str) -> None:
    begun = time.thread_time()
    assert refused(source).status == 400
    assert time.thread_time() - begun < 4, "2 s and what one step may take"


@pytest.mark.parametrize("source", BOMBS)
def test_it_stays_small(source: str) -> None:
    tracemalloc.start()
    try:
        refused(source)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400 << 20


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ (messages | attr('__class__')).mro() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ '{0.__class__.x}'.format(messages) }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ undefined_thing.attribute }}",
        "{{ undefined_thing | tojson }}",
    ],
)
def test_what_is_not_allowed_or_goes_wrong_is_one_line(source: str) -> None:
    assert refused(source).param == "messages"


def test_what_is_private_prints_as_nothing() -> None:
    assert render("{{ ''.__class__ }}{{ '{0.__class__}'.format(1) }}!") == "!"


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ a | nosuchfilter }}",
        "{{ 'x' | urlize }}",
        "{% endif %}",
        "{% extends %}",
        "{{" + "(" * 2000 + ")" * 2000 + "}}",
        "{{ " + "[" * 5000,
        "x" * 600_000,
        "{% if a %}" * 3000 + "{% endif %}" * 3000,
    ],
)
def test_what_does_not_compile_is_refused_when_opened(source: str) -> None:
    with pytest.raises(OpenError, match=r"^the chat template .+$") as caught:
        ChatTemplate(source)
    assert len(str(caught.value)) < 400


def test_raise_exception_reaches_the_client() -> None:
    with pytest.raises(RequestError, match=r"refused the messages: only one user, please$") as caught:
        render("{{ raise_exception('only one\nuser, please') }}")
    assert caught.value.status == 400


def test_a_refusal_repeats_the_template_and_no_message() -> None:
    source = "{{ raise_exception('Not this role: ' ~ messages[0].role ~ messages[0].content) }}"
    with pytest.raises(RequestError, match=r"refused the messages: Not this role:$"):
        render(source)
    with pytest.raises(RequestError, match=r"refused the messages$"):
        ChatTemplate("{{ raise_exception(messages[0].content) }}").render(USER)


def test_a_long_conversation_is_well_within_the_bounds() -> None:
    source = "{% for m in messages %}{{ '<' ~ m.role ~ '>' + m.content | trim }}{% endfor %}"
    messages = [{"role": "user", "content": "word " * 40}] * 20_000
    assert len(ChatTemplate(source).render(messages)) == 20_000 * (6 + 199)


def test_one_rendering_does_not_pay_for_another() -> None:
    template = ChatTemplate("{% for a in range(90000) %}{% endfor %}done")
    assert [template.render(USER) for _ in range(30)] == ["done"] * 30
