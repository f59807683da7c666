"""Chat templates, hostile and broken; judged by a plain jinja2 sandbox, given the same messages."""

from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz import damages, material
from benchmarks.fuzz.cases import Trial

HOSTILE = (
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**10 }}", "{{ [0] * 10**10 }}",
    "{% for m in messages %}{{ m.content * 10**9 }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ ''.__class__.__mro__ }}",
    "{{ 9**9**9 }}", "{{ range(10**8) | list | length }}", "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ messages.__class__.__base__.__subclasses__() }}", "{% include '/etc/passwd' %}", "{{ 'a' | center(10**10) }}",
    "{{ '%010000000000d' % 1 }}", "{{ '{:>10000000000}'.format(1) }}",
    "{% set x = namespace(a='x') %}{% for i in range(64) %}{% set x.a = x.a + x.a %}{% endfor %}{{ x.a }}",
    "{{ lipsum(n=10**6) }}", "{{ raise_exception('no') }}",
    "{% for i in range(10**4) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}", "{{ undefined.x.y }}", "{{",
    "{% for %}", "{% extends 'x' %}", "{{ messages[99].content }}", "{{ strftime_now('%Y') }}", "{{ 1 / 0 }}", "",
    "{{ '(a+)+$' }}", "{{ messages | tojson }}", "{{ messages | map(attribute='x') | list }}", "{% generation %}",
    "{{ 'x' | wordwrap(0) }}", "{{ ([1] * 1000) | map('string') | join('x' * 10**7) }}",
    "{{ '\ud800' }}", "{{ '\\0' }}",
)  # fmt: skip


def prepare(place: Path) -> Any:
    return material.tokenizer()


def trial(base: Any, rng: Random, folder: Path) -> Trial:
    template = rng.choice(HOSTILE) if rng.random() < 0.6 else _cut(rng)
    if rng.random() < 0.3:
        template = material.TEMPLATE + template
    messages = [{"role": "user", "content": rng.choice(("hello", "<end>", "é" * 50, ""))},
                {"role": "assistant", "content": "yes"}][:rng.choice((1, 2))]
    return Trial(f"{template[:150]!r}", lambda: ours(base, template, messages), _by_jinja(template, messages))


def _cut(rng: Random) -> str:
    _, content = damages.bytes_of(material.TEMPLATE.encode(), rng)
    return content.decode("utf-8", "replace")[:10_000]


def ours(tokenizer: Any, template: str, messages: list[dict]) -> str:
    from peft_jax.hub.chat_template import describe_stops, render

    tokenizer.chat_template = template
    describe_stops(tokenizer)
    return render(tokenizer, messages, True, "a chat")


def _by_jinja(template: str, messages: list[dict]):
    def judge(result: str) -> str:
        import json

        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if len(result) > 1 << 20:
            return f"a text of {len(result)} characters"
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
        if "strftime_now" in template or "lipsum" in template:  # of another moment, and random
            return ""
        try:
            expected = environment.from_string(template).render(messages=messages, add_generation_prompt=True,
                                                                tools=None, eos_token="<end>", pad_token="<end>")
        except Exception as error:  # what jinja and the template raise
            return f"it was accepted, and jinja refuses it: {type(error).__name__}: {error}"
        return "" if result == expected else f"{result[:80]!r}, by jinja {expected[:80]!r}"

    return judge
