"""Chat templates that come with a model, rendered within bounds: of processor time, and of the texts that they make.

A template is a program of somebody else. jinja2's sandbox keeps it from the machine, but neither from its time nor from
its memory. So here whatever a template makes is counted (``Budget.made``), the turns of its loops and macros too
(``_Counting`` puts that into the program), and what makes much out of little, as ``'a' * 10**10`` does, is estimated
before. The words that templates know are those of transformers.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from peft_jax.hub.render_budget import (
    CONTAINERS,
    ITEM,
    MOST_BITS,
    MOST_TEXTS,
    TEXTS,
    Budget,
    check_format,
    size,
)

MOST_TEMPLATE = 1 << 16  # characters of a template; the longest known has a half
LEFT_OUT = {"translate", "maketrans", "format_map", "to_bytes", "fromhex"}  # methods that no chat needs
LEFT_OUT_FILTERS = {"striptags", "urlize", "xmlattr", "pprint", "wordwrap", "forceescape"}  # likewise, of pages

_BUDGET: ContextVar[Budget] = ContextVar("budget of a rendering")


class _Names(Namespace):
    """jinja2's ``namespace()``, without names that mean something to Python."""

    def __init__(*args: Any, **kwargs: Any):  # so that ``self`` may be a name
        _Names._check(kwargs)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _Names._check({name: value})
        super().__setitem__(name, value)

    @staticmethod
    def _check(values: dict[str, Any]) -> None:
        if odd := [name for name in values if name.startswith("_")]:
            raise jinja2.TemplateError(f"it gives a namespace the name {odd[0]!r:.60}")


class _Generation(Extension):
    """``{% generation %}``, which marks what a model writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Counting(NodeTransformer):
    """Each turn of a loop and each call of a macro counts itself and its text; texts that are joined and lists that are
    written down are counted, too."""

    def _charged(self, node: Any) -> Any:
        self.generic_visit(node)
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_own("charge", nodes.Const(1 + text))))
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _charged

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _own("joined", *node.nodes)

    def _made(self, node: Any) -> Any:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _own("made", node)

    visit_List = visit_Tuple = visit_Dict = _made


def _own(name: str, *args: nodes.Expr) -> nodes.Call:
    """A call of a method of the environment."""
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


class _Bounded(ImmutableSandboxedEnvironment):
    """The sandbox, within the bounds of the :class:`Budget` of the rendering that is under way."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False,
                         finalize=_written)
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raised, "strftime_now": _now, "dict": _dict, "namespace": _Names}
        filters = {**self.filters, "tojson": _json}
        self.filters = {name: _counted(name, one) for name, one in filters.items() if name not in LEFT_OUT_FILTERS}

    def charge(self, count: int) -> None:
        _BUDGET.get().charge(count)

    def made(self, value: Any) -> Any:
        return _BUDGET.get().made(value)

    def joined(self, *parts: Any) -> str:
        budget, texts = _BUDGET.get(), [_text(part) for part in parts]
        budget.allow(sum(map(len, texts)))
        return budget.made("".join(texts))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in LEFT_OUT and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        target = getattr(__obj, "__self__", None)
        if target is __self:  # what _Counting put there
            return __obj(*args)
        if hasattr(__obj, "__wrapped__"):  # the sandbox's own str.format
            target = getattr(__obj.__wrapped__, "__self__", target)
        budget = _BUDGET.get()
        budget.charge(1)
        if isinstance(target, TEXTS):
            others = [one for name, one in kwargs.items() if name not in ("_loop_vars", "_block_vars")]  # jinja2's own
            budget.before(__obj.__name__, target, (*args, *others))
        return budget.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _BUDGET.get()
        if operator == "+":
            if isinstance(left, CONTAINERS) and isinstance(right, CONTAINERS):
                budget.allow(ITEM * (len(left) + len(right)))
            return budget.made(self.binop_table["+"](left, right))
        if operator == "%" and isinstance(left, str):
            budget.allow((len(left) + 1) * check_format(left, [right], "%"), MOST_TEXTS)
        elif isinstance(left, int) and isinstance(right, int):
            if operator != "%" and left.bit_length() * (abs(right) if operator == "**" else 1) > MOST_BITS:
                raise jinja2.TemplateError(f"it makes a number of over {MOST_BITS:,} bits")
        elif operator == "*":
            times = [abs(one) for one in (left, right) if isinstance(one, int)]
            repeated = [one for one in (left, right) if isinstance(one, (*TEXTS, *CONTAINERS))]
            budget.allow(sum(map(size, repeated)) * max(*times, 1, 1))
        return budget.made(super().call_binop(context, operator, left, right))


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # what jinja2 gives some beside the value

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        budget.charge(1)
        budget.before(name, args[first], (*args[first + 1:], *kwargs.values()))
        return budget.made(function(*args, **kwargs))

    return counted


@jinja2.pass_context  # lest jinja2 calls it while it compiles
def _written(context: Any, value: Any) -> str:
    """``value`` as it is put into the text."""
    text = _text(value)
    _BUDGET.get().charge(len(text))
    return text


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    _BUDGET.get().allow(size(value))
    return str(value)


def _raised(message: Any) -> None:
    raise jinja2.TemplateError(_text(message))


def _now(form: str) -> str:
    if len(form) > 1000 or re.search(r"%[^a-zA-Z%]*\d", form):
        raise jinja2.TemplateError(f"it asks for the time in the form '{form:.60}'")
    return datetime.now().strftime(form)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
          sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@contextmanager
def _budget() -> Iterator[None]:
    token = _BUDGET.set(Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


@functools.lru_cache(maxsize=16)
def _program(template: str) -> jinja2.Template:
    if len(template) > MOST_TEMPLATE:
        raise jinja2.TemplateError(f"it has {len(template):,} characters, more than {MOST_TEMPLATE:,}")
    environment = _Bounded()
    with _budget():
        tree = _Counting().visit(environment.parse(template))
        return environment.from_string(tree.set_lineno(1).set_environment(environment))


def render(template: str, **values: Any) -> str:
    """What ``template`` makes of ``values``: of texts, numbers, lists and dicts alone.

    Raises whatever jinja2 and the template raise, and ``jinja2.TemplateError`` beyond the bounds.
    """
    program = _program(template)
    with _budget():
        return program.render(**values)
