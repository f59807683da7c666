"""Regular expressions that stop."""

import re

import pytest

from peft_jax.core import patterns
from peft_jax.errors import PeftJaxError

NAME = "layers.0.self_attn.q_proj"


@pytest.mark.parametrize("pattern", [r".*\.q_proj", r"^(?!.*vision).*(q|v)_proj$", r"layers\.\d{1,2}\..*", "(?P<x>l).*",
                                     "q"])
def test_it_matches_as_re_does(pattern):
    for whole, other in ((True, re.fullmatch), (False, re.match)):
        assert bool(patterns.match(pattern, NAME, whole)) == bool(other(pattern, NAME))


@pytest.mark.parametrize(("pattern", "why"), [
    ("(", "is no regular expression: missing \\)"),
    ("(" * 3000 + ")" * 3000, "is no regular expression: maximum recursion"),
    ("a{99999999999999999999}", "repeats more than"),
    ("((a{1000}){1000}){1000}", "repeats more than"),
    ("a" * 60_000, "has 60000 characters, more than"),
])
def test_what_cannot_be_compiled_within_bounds_says_why(pattern, why):
    with pytest.raises(PeftJaxError, match=why):
        patterns.match(pattern, NAME)


@pytest.mark.slow
def test_what_would_never_end_is_an_error():
    with pytest.raises(PeftJaxError, match=r"the pattern '.*' takes over 1 s to be compared with 'layers.0"):
        patterns.match(r"(?:.*?.*?)*" * 50 + "x", f"{NAME}.{'a' * 30}{'x' * 30}!", whole=True)
