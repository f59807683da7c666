"""Chat templates that come with a model, rendered within bounds: of processor time, and of the texts that they make.

A template is a program of somebody else. jinja2's sandbox keeps it from the machine, but neither from its time nor from
its memory. So here whatever a template makes is counted (``Budget.made``), the turns of its loops and macros too
(``_Counting`` puts that into the program), and what makes much out of little, as ``'a' * 10**10`` does, is estimated
before. The words that templates know are those of transformers.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Macro
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MOST_TEMPLATE = 1 << 16  # characters of a template; the longest known has a half
MOST_TEXT, MOST_TEXTS = 1 << 24, 1 << 28  # characters of one text or list, and of all that one rendering makes
MOST_BITS = 8192  # of a whole number
SECONDS = 1.0  # of the processor, for one rendering, which takes milliseconds
LOOK = 100  # steps, or thousands of characters, between two looks at the clock
TEXTS, CONTAINERS = (str, bytes), (list, tuple, set, dict)
COUNTED = (*TEXTS, *CONTAINERS, int)
ITEM = 50  # characters that an entry of a list counts as, beside its own: what Python takes for it

# Methods and filters whose result is as long as the sum, or the product, of their text and of their other arguments.
ADDING = {"center", "ljust", "rjust", "zfill", "batch", "slice", "truncate"}
MULTIPLYING = {"replace", "join", "indent", "tojson", "format", "expandtabs"}
# Those that make a list of a text's lines, words or characters.
SPLITTING = {"split", "rsplit", "splitlines", "batch", "groupby", "list", "map", "max", "min", "random", "reject",
             "rejectattr", "select", "selectattr", "slice", "sort", "sum", "unique"}
LEFT_OUT = {"translate", "maketrans", "format_map", "to_bytes", "fromhex"}  # methods that no chat needs
LEFT_OUT_FILTERS = {"striptags", "urlize", "xmlattr", "pprint", "wordwrap", "forceescape"}  # likewise, of pages
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
# Widths of 1000 and more, or that are told elsewhere, in text that is formatted.
_WIDE = {"%": re.compile(r"%[^a-zA-Z%]*(\*|\d{4})"), "{": re.compile(r"\d{4}|\{[^{}]*\{")}


class Budget:
    """What is left of one rendering's time and texts; each method raises ``jinja2.TemplateError`` beyond that."""

    def __init__(self):
        self.left, self.end, self.unseen = MOST_TEXTS, time.thread_time() + SECONDS, 0

    def charge(self, count: int) -> None:
        self.left -= count
        self.unseen += 1 + count // 1000
        if self.left < 0:
            raise jinja2.TemplateError(f"it makes texts of over {MOST_TEXTS:,} characters")
        if self.unseen > LOOK:  # to look at the clock takes longer than what most steps do
            self.unseen = 0
            if time.thread_time() > self.end:
                raise jinja2.TemplateError(f"it takes over {SECONDS:g} s")

    def allow(self, count: int, most: int = MOST_TEXT) -> None:
        """Before something of ``count`` characters, or no more, is made."""
        if count > most:
            raise jinja2.TemplateError(f"it makes a text or a list of over {most:,} characters")

    def made(self, value: Any) -> Any:
        """``value``, which was made, counted."""
        count = len(value) if type(value) is str else size(value) if isinstance(value, COUNTED) else 1
        if count > MOST_TEXT:
            self.allow(count)
        self.charge(1 + count)
        return value

    def before(self, name: str, value: Any, others: tuple[Any, ...]) -> None:
        """Before the method or filter ``name`` of ``value`` with ``others``."""
        if name in MULTIPLYING:
            amount = sum(map(_amount, others)) + (_check_format(value, others) if name == "format" else 0)
            self.allow((_amount(value) if hasattr(value, "__next__") else size(value) + 1) * (amount + 1), MOST_TEXTS)
        elif name in ADDING:
            self.allow(sum(map(_amount, others)))
        elif name == "round" and sum(map(_amount, others)) > 300:
            raise jinja2.TemplateError("it rounds to hundreds of places")
        elif name == "sum" and not all(isinstance(one, str | int | float) for one in others):
            raise jinja2.TemplateError("it sums up lists")
        if name in SPLITTING and isinstance(value, TEXTS):
            self.allow(ITEM * _pieces(name, value, others))


_BUDGET: ContextVar[Budget] = ContextVar("budget of a rendering")


def size(value: Any) -> int:
    """About how many characters ``value`` has as text; what stands in it twice counts twice.

    Raises ``jinja2.TemplateError`` for what is no text, number, list or dict, as it may hold anything.
    """
    return _size(value, {})


def _size(value: Any, known: dict[int, int]) -> int:
    if isinstance(value, TEXTS):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3 + 1
    if isinstance(value, CONTAINERS):
        if id(value) not in known:
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            known[id(value)] = sum(_size(part, known) + ITEM for part in parts)
        return known[id(value)]
    if value is None or isinstance(value, float | range | jinja2.Undefined | Macro):
        return 8
    raise jinja2.TemplateError(f"it writes something of type {type(value).__name__}")


def _amount(value: Any) -> int:
    """How many times, or characters, an argument asks for."""
    if isinstance(value, int):
        return abs(value)
    if hasattr(value, "__len__"):
        return len(value)
    return MAX_RANGE if hasattr(value, "__next__") else 0


def _pieces(name: str, text: Any, others: Sequence[Any]) -> int:
    """How many entries a list of a text's parts has, or no more."""
    if name == "splitlines":
        return len(text) if isinstance(text, bytes) else sum(map(text.count, LINE_ENDS))
    if name in ("split", "rsplit") and others and isinstance(others[0], TEXTS) and others[0]:
        return text.count(others[0])
    return len(text)


def _check_format(text: Any, others: Sequence[Any] = (), kind: str = "") -> int:
    """The characters that formatting ``text`` puts in the place of a field, or fewer. Raises ``jinja2.TemplateError``
    where it asks for a large width."""
    if _WIDE[kind or ("{" if "{" in text else "%")].search(text):
        raise jinja2.TemplateError(f"it formats with '{text:.60}', a width of 1000 or more")
    return sum(map(size, others)) + 1000


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
            budget.allow((len(left) + 1) * _check_format(left, [right], "%"), MOST_TEXTS)
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
