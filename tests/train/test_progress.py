"""What a person who watches is told, by a clock that the test turns."""

import io
import sys
from types import SimpleNamespace

import pytest

from peft_jax.train import progress


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def told(shown, clock, capsys, at):
    for clock.seconds, step in at:
        shown.update(step, 1.5, 1000.0)
    return [line.split("tokens/s  ")[1] for line in capsys.readouterr().err.splitlines()]


def test_the_time_left_is_that_of_the_steps_of_this_run(clock, capsys):
    """Of a run that goes on from step 10: a line after its first step, every ten seconds, and at the end."""
    shown = progress.Progress(total=50, done=10)
    at = [(2, 11), (5, 12), (11.9, 13), (12, 14), (21, 15), (100, 50)]
    assert told(shown, clock, capsys, at) == ["1 min 18 s left", "1 min 48 s left", "0 s left"]


def test_where_it_is_not_shown_nothing_is(clock, capsys):
    assert told(progress.Progress(total=5, done=0, shown=False), clock, capsys, [(1, 1), (30, 3), (31, 5)]) == []


class Terminal(io.StringIO):
    """Which is standard error and output in one, as a person's is."""

    def isatty(self):
        return True


def terminal_of(monkeypatch):
    """In the test itself: pytest sets both anew between fixtures and test."""
    one = Terminal()
    monkeypatch.setattr(sys, "stderr", one)
    monkeypatch.setattr(sys, "stdout", one)
    return one


def test_a_line_is_not_printed_into_the_bar(monkeypatch):
    """What comes before it on its own line is blank: the bar is taken away, and drawn again below."""
    terminal = terminal_of(monkeypatch)
    shown = progress.Progress(total=50, done=10)
    shown.update(11, 1.5, 1000.0)
    progress.say("evaluated after step 11: " + ", ".join(f"metric_{number} 0.500" for number in range(6)))
    shown.close()
    lines = [line.rpartition("\r")[2] for line in terminal.getvalue().split("\n")]
    first = next(at for at, line in enumerate(lines) if line.startswith("evaluated"))
    assert max(map(len, lines)) < 80 and "metric_5 0.500" in lines[first + 1] and "step" not in lines[first + 1]
    assert "11/50" in lines[first + 2]


def test_batches_are_watched_on_a_terminal_alone(monkeypatch):
    terminal = terminal_of(monkeypatch)
    assert list(progress.watched("abc", 3, "evaluating")) == ["a", "b", "c"]
    assert "evaluating" in terminal.getvalue() and terminal.getvalue().endswith("\r")  # and the bar goes
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress.watched("abc", 3, "evaluating")) == ["a", "b", "c"]
    assert sys.stderr.getvalue() == ""


def test_a_terminal_gets_a_bar_at_the_step(monkeypatch):
    terminal_of(monkeypatch)
    shown = progress.Progress(total=50, done=10)
    for step in (11, 12, 15):
        shown.update(step, 1.5, 1000.0)
        assert shown.bar.n == step
    shown.close()
    assert "loss 1.500, 1,000 tok/s" in sys.stderr.getvalue()
