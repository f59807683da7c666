"""Chat templates of others end: what they make and how long they take has bounds, and what is usual is as it was."""

import datetime

import jinja2
import pytest

from peft_jax.hub import bounded_jinja, chat_template

MESSAGES = [{"role": role, "content": f"<think>hm</think>\n{role} 12"} for role in ("user", "assistant") * 2]
TOOLS = [{"name": "f", "parameters": {"x": [1, 2.5, None, True]}}]
USUAL = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' ~ m['content'] }}{% endfor %}",
    "names, macros, loops": """{%- set ns = namespace(last=0) %}
        {%- macro show(c) %}{% if c is string %}{{ c }}{% else %}{% for i in c %}{{ i.text }}{% endfor %}{% endif %}
        {%- endmacro %}
        {%- for m in messages[::-1] if m.role == 'user' %}{% set ns.last = loop.index0 %}{{ loop.last }}{% endfor %}
        {%- for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}
        {{- show(m.content).split('</think>')[-1].lstrip('\n') | trim }}
        {% endfor %}{{ ns.last }}""",
    "what is generated": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "tools": "{% for t in tools %}{{ t | tojson }}{{ t | tojson(indent=2) }}{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}{{ 'a b' | title }}{{ [3, 1] | sort | first }}"
               "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'x' | indent(4, true) }}",
    "formats": "{{ '%s-%03d' % ('x', 5) }}{{ '{:>5}'.format(1) }}{{ 'a,b'.replace(',', ';') }}{{ 7 * 6 }}{{ 2 ** 8 }}",
    "values": "{{ none }}{{ true }}{{ 1.5 }}{{ [1, 'a'] }}{{ {'a': 1} }}{{ missing }}{{ (1, 2) + (3,) }}",
    "recursion": "{% for x in [[1], [2]] recursive %}{% if x is number %}{{ x }}{% else %}{{ loop(x) }}{% endif %}"
                 "{% endfor %}",
}


def rendered(template, messages=MESSAGES, tools=TOOLS):
    return bounded_jinja.render(template, messages=messages, tools=tools, documents=None, add_generation_prompt=True)


@pytest.mark.parametrize("template", USUAL.values(), ids=USUAL.keys())
def test_usual_templates_write_what_transformers_lets_them_write(template):
    theirs = pytest.importorskip("transformers.utils.chat_template_utils")
    (text,), _ = theirs.render_jinja_template([MESSAGES], TOOLS, chat_template=template, add_generation_prompt=True)
    assert rendered(template) == text != ""


def test_the_day_is_known():
    assert rendered("{{ strftime_now('%Y') }}") == str(datetime.date.today().year)


DOUBLED = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x }}"
OVER = "characters"
HOSTILE = [
    ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    ("{{ 'a' * 10**10 }}", OVER),
    ("{{ 10**10 * 'a' }}", OVER),
    ("{{ [1] * 10**9 }}", OVER),
    ("{{ ['x' * 10**7] * 10 }}", OVER),
    ("{{ (2 ** 8000) ** 8000 }}", "bits"),
    (DOUBLED % ("2", "ns.x * ns.x"), "bits"),
    (DOUBLED % ("'a'", "ns.x ~ ns.x"), OVER),
    (DOUBLED % ("'a'", "ns.x + ns.x"), OVER),
    (DOUBLED % ("[1]", "[ns.x, ns.x]"), OVER),
    (DOUBLED % ("[1]", "(ns.x, ns.x)"), OVER),
    (DOUBLED % ("[1]", "{'a': ns.x, 'b': ns.x}"), OVER),
    (DOUBLED % ("[1]", "dict(a=ns.x, b=ns.x)"), OVER),
    (DOUBLED % ("[1]", "ns.x + ns.x"), OVER),
    ("{{ 'a' | center(10**10) }}", OVER),
    ("{{ 'a'.center(10**10) }}", OVER),
    ("{{ 'a' | attr('ljust') (10**10) }}", OVER),
    ("{{ '%9999999999d' % 1 }}", "width"),
    ("{{ '%*d' % (10**10, 1) }}", "width"),
    ("{{ '%9999999d' | format(1) }}", "width"),
    ("{{ '{:>9999999999}'.format(1) }}", "width"),
    ("{{ '{:>{}}'.format(1, 10**10) }}", "width"),
    ("{{ ('a' * 10**7).replace('a', 'b' * 10**6) }}", OVER),
    ("{{ ('a' * 10**7) | replace('a', 'b' * 10**6) }}", OVER),
    ("{{ ('b' * 10**6).join(['a'] * 10**5) }}", OVER),
    ("{{ (['a'] * 10**5) | join('b' * 10**6) }}", OVER),
    ("{{ '{0}{0}{0}{0}{0}'.format('x' * 10**7) }}", OVER),
    ("{{ ('\t' * 10**6).expandtabs(10**6) }}", OVER),
    ("{{ [1] | batch(10**10, 'x') | list }}", OVER),
    ("{{ [1] | slice(10**10) | list }}", OVER),
    ("{{ 1.5 | round(10**9, 'floor') }}", "places"),
    ("{{ ('\n' * 10**6) | indent(10**6) }}", OVER),
    ("{{ [[1]] | sum(start=[]) }}", "sums up lists"),
    ("{{ range(10**5) | map('center', 10**5) | list }}", OVER),
    ("{{ ('a ' * 8000000).split() }}", OVER),
    ("{{ ('ab' * 8000000) | sort }}", OVER),
    ("{{ lipsum(n=10**7) }}", "undefined"),
    ("{{ (1).to_bytes(10**10, 'big') }}", "unsafe"),
    ("{{ 'a'.translate({97: 'b'}) }}", "unsafe"),
    ("{{ strftime_now('%1000000000d') }}", "in the form"),
    ("{% for i in range(10**5) %}" + "x" * 50_000 + "{% endfor %}", OVER),
    ("{{ '" + "a" * 70_000 + "' }}", OVER),
    ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{% block a %}{{ self.a() }}{% endblock %}", "recursion"),
    ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursion"),
    ("{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}", "writes something"),
    ("{{ namespace(_x=1) }}", "namespace the name"),
    ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ("{% include 'x' %}", "no loader"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "why"), HOSTILE, ids=[template[:40] for template, _ in HOSTILE])
def test_what_makes_much_of_little_is_an_error(template, why):
    with pytest.raises((jinja2.TemplateError, RecursionError, OverflowError, TypeError), match=why):
        rendered(template)


@pytest.mark.slow
@pytest.mark.parametrize("template", [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% set x = 'a' * 10**7 %}{% for i in range(99999) %}{% if 'b' in x %}{% endif %}{% endfor %}",
])
def test_what_never_ends_is_an_error(template):
    with pytest.raises(jinja2.TemplateError, match="it takes over 1 s"):
        rendered(template)


def test_one_rendering_leaves_the_next_its_bounds():
    for _ in range(3):
        assert len(rendered("{% for i in range(20) %}{{ 'x' * 10**6 }}{% endfor %}")) == 2 * 10**7


def test_a_template_sees_texts_numbers_lists_and_dicts_alone():
    odd = {"role": "user", "content": datetime.date(2024, 5, 1), "more": ({1, 2}, b"x")}
    assert chat_template.plain(odd) == {"role": "user", "content": "2024-05-01", "more": ["{1, 2}", "b'x'"]}
