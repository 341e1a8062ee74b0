"""Chat templates: what transformers renders, and the bounds that a hostile one meets."""

from __future__ import annotations

import time
from typing import Any

import pytest

from llmc.runtime import template_limits
from llmc.runtime.chat import ChatTemplate, special_tokens, template_source
from llmc.runtime.document import Field
from llmc.runtime.errors import ModelError
from tests.fixtures import fixture_path

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <b>&amp;</b>"}],
    [
        {"role": "system", "content": "Be brief.\nAlways."},
        {"role": "user", "content": "  What is 2 + 2?  "},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Naïve – 東京?"},
    ],
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def templates() -> list[str]:
    return sorted(path.name for path in fixture_path("tokenizers/chat-templates").glob("*.jinja"))


def judged(source: str, **values: Any) -> str | None:
    """What transformers renders; None where it refuses."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        return str(_compile_jinja_template(source).render(documents=None, **SPECIAL, **values))
    except (TemplateError, TypeError):
        return None


def test_real_templates_render_as_in_transformers() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    rendered = 0
    for name in templates():
        source = (fixture_path("tokenizers/chat-templates") / name).read_text(encoding="utf-8")
        ours = ChatTemplate(source, SPECIAL)
        for messages in CONVERSATIONS:
            for tools in (None, TOOLS):
                for prompt in (True, False):
                    expected = judged(source, messages=messages, tools=tools, add_generation_prompt=prompt)
                    if expected is None:
                        with pytest.raises(ValueError, match="does not take these messages"):
                            ours.render(messages, tools, prompt)
                    else:
                        assert ours.render(messages, tools, prompt) == expected, name
                        rendered += 1
    assert rendered > 60


SMALL = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ m.role }}{{ '' if loop.last else ', ' }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m.content|trim|upper }}{% else %}none{% endfor %}",
    "{% macro say(x, y='!') %}<{{ x }}{{ y }}>{% endmacro %}{{ say('a') }}{{ say('b', y=1 + 1) }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% macro wrap() %}[{{ caller('x') }}]{% endmacro %}{% call(v) wrap() %}{{ v ~ '!' }}{% endcall %}",
    "{% set text %}  {{ messages[0].content }} {% endset %}{{ text|trim }}",
    "{% set text | upper %}abc{% endset %}{{ text }}{% filter lower %}ABC{% endfilter %}",
    "{{ messages|map(attribute='role')|join(', ') }} {{ messages|join('-', attribute='role') }}",
    "{{ ', '.join(['a', 'b']) }}{{ '-'.join(messages|map(attribute='role')) }}",
    "{{ {'a': [1, 2.5, none, true], 'é': '<'}|tojson }} {{ [1]|tojson(indent=2) }} {{ 'x'|tojson(ensure_ascii=true) }}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% generation %}{{ 'said' }}{% endgeneration %} {{ '%s-%d' % ('a', 3) }} {{ '{}={x}'.format(1, x=2) }}",
    "{{ 'a,b'.split(',')[1] }} {{ 'abc'[::-1] }} {{ 'abc'.replace('b', 'xx') }} {{ 'a\nb'|indent(2) }}",
    "{{ (1, 2)|sum }} {{ [1, 2] + [3] }} {{ 'ab' * 3 }} {{ 2 ** 5 }} {{ 7 % 4 }} {{ 3.14159|round(2) }}",
    "{% for k, v in {'b': 1, 'a': 2}|dictsort %}{{ k }}{{ v }}{% endfor %} {{ dict(a=1) }} {{ [3, 1]|sort|first }}",
    "{% for k, v in {'q': 1}.items() %}{{ k }}{% endfor %}{% set a, b = (1, 2) %}{{ b }}{{ a }}",
    "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}{{ loop(x) }}{% else %}{{ x }}{% endif %}{% endfor %}",
    "{{ undefined_name }}{{ messages[0].nothing is defined }}{{ messages[0].get('tool', 'none') }}{{ bos_token }}",
    "{{ [1, 2, 3]|batch(2)|list }} {{ '%05.1f'|format(2.25) }} {{ messages[-1]['content']|length }} {{ 5|string ~ 6 }}",
    "  {%- if true %}\n    line\n    {%- endif %}\n{{ 'a' if false }}\n",
]


@pytest.mark.parametrize("source", SMALL)
def test_every_construct_renders_as_in_transformers(source: str) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    expected = judged(source, messages=CONVERSATIONS[1], tools=None, add_generation_prompt=True)
    assert expected is not None
    assert ChatTemplate(source, SPECIAL).render(CONVERSATIONS[1]) == expected


DOUBLING = "{% for i in range(60) %}{% set ns.x = EXPRESSION %}{% endfor %}{{ ns.x }}"
HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "loops in a filter": "{% for a in range(99999) %}{{ range(99999)|list|length }}{% endfor %}",
    "recursive loop": "{% for x in [1,1,1,1,1,1,1,1,1] recursive %}{{ loop([1,1,1,1,1,1,1,1,1]) }}{% endfor %}",
    "recursive macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "doubling by ~": DOUBLING.replace("EXPRESSION", "ns.x ~ ns.x"),
    "doubling by +": DOUBLING.replace("EXPRESSION", "ns.x + ns.x"),
    "doubling by join": DOUBLING.replace("EXPRESSION", "[ns.x, ns.x]|join"),
    "doubling by str.join": DOUBLING.replace("EXPRESSION", "''.join([ns.x, ns.x])"),
    "doubling by replace": DOUBLING.replace("EXPRESSION", "ns.x.replace('x', 'xx')"),
    "doubling by format": DOUBLING.replace("EXPRESSION", "'{0}{0}'.format(ns.x)"),
    "doubling by %": DOUBLING.replace("EXPRESSION", "'%s%s' % (ns.x, ns.x)"),
    "nested lists": DOUBLING.replace("EXPRESSION", "[ns.x, ns.x]"),
    "nested lists to JSON": DOUBLING.replace("EXPRESSION", "[ns.x, ns.x]").replace("{{ ns.x }}", "{{ ns.x|tojson }}"),
    "nested dicts": DOUBLING.replace("EXPRESSION", "dict(a=ns.x, b=ns.x)"),
    "nested namespaces": DOUBLING.replace("EXPRESSION", "namespace(a=ns.x, b=ns.x)") + "{{ 'y' * 10 ** 9 }}",
    "doubling by a block": "{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "repetition": "{{ 'x' * 10 ** 12 }}",
    "repetition of a list": "{{ [1] * 10 ** 12 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "powers": "{% set ns.n = 9 %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "a width by filter": "{{ '%1000000000d'|format(1) }}",
    "a width by format": "{{ '{:>1000000000}'.format(1) }}",
    "a computed width": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "a computed width of %": "{{ '%*d' % (1000000000, 1) }}",
    "padding": "{{ 'x'.ljust(10 ** 9) }}",
    "centre": "{{ 'x'|center(10 ** 9) }}",
    "an indent": "{{ 'x\ny'|indent(10 ** 9) }}",
    "an indent of JSON": "{{ [1]|tojson(indent=10 ** 9) }}",
    "a batch": "{{ [1]|batch(10 ** 9, 'x')|list }}",
    "a rounding": "{{ 1|round(10 ** 9, 'ceil') }}",
    "a rounding down": "{{ 1|round(-10 ** 9) }}",
    "a sum of lists": "{{ [[1]]|sum(start=[]) }}",
    "replacement of all": "{{ ('x' * 10 ** 6)|replace('x', 'y' * 10 ** 6) }}",
    "replacement in a map": "{{ range(99999)|map('replace', '0', 'y' * 10 ** 6)|list }}",
    "a default in a map": "{{ range(99999)|map(attribute='no', default='y' * 10 ** 6)|join }}",
    "lorem ipsum": "{{ lipsum(n=10 ** 9) }}",
    "a long output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "an attribute": "{{ ''.__class__.__mro__ }}",
    "an attribute by filter": "{{ ''|attr('__class__') }}",
    "a change of the messages": "{{ messages.append(1) }}{{ messages.clear() }}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "not a template": "{% for %}",
    "an unknown filter": "{{ 1|nothing }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2")
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.5)
    source = "{% set ns = namespace(x='x') %}" + HOSTILE[name]
    started = time.monotonic()
    try:
        text = ChatTemplate(source, {}).render(CONVERSATIONS[0])
    except (ModelError, ValueError) as error:
        assert "the chat template" in str(error)
    else:
        assert name in ("an attribute", "an attribute by filter") and text == "", "it should have met a bound"
    assert time.monotonic() - started < 10


def test_what_the_template_says_reaches_the_caller() -> None:
    pytest.importorskip("jinja2")
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ValueError, match="roles must alternate"):
        template.render(CONVERSATIONS[0])


def test_the_date() -> None:
    pytest.importorskip("jinja2")
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render(CONVERSATIONS[0]) == time.strftime("%Y")


def test_variables_and_special_tokens() -> None:
    pytest.importorskip("jinja2")
    template = ChatTemplate("{{ bos_token }}{{ thinking }}{{ messages|length }}", {"bos_token": "<s>"})
    assert template.render(CONVERSATIONS[1], variables={"thinking": False, "messages": 3}) == "<s>False4"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: given"),
        ("hi", "messages: given 'hi', expected a non-empty list"),
        ({"role": "user"}, "messages: given"),
        (["hi"], "messages[0]: given 'hi', expected an object with a 'role'"),
        ([{"content": "x"}], "messages[0]"),
        ([{"role": 1}], "messages[0]"),
        ([{"role": "user", "content": object()}], "expected what JSON can say"),
    ],
)
def test_messages_that_are_none(messages: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ChatTemplate("x", {}).render(messages)
    assert message in str(caught.value)


def test_where_the_template_is_found() -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    cases = [
        ({}, None),
        ({"chat_template": "a"}, "a"),
        ({"chat_template": named}, "d"),
        ({"chat_template": named[:1]}, None),
    ]
    for config, expected in cases:
        field = Field(config, "tokenizer_config.json")
        assert template_source(None, field) == expected
        assert template_source("file", field) == "file"
    assert template_source(None, None) is None
    tokens = Field({"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}, "x")
    assert special_tokens(tokens) == {"bos_token": "<s>", "eos_token": "</s>"}
    with pytest.raises(ModelError, match="chat_template"):
        template_source(None, Field({"chat_template": 3}, "tokenizer_config.json"))
