"""How far training has come, for a person who watches."""

import sys
import textwrap
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from peft_jax.parallel import processes

COLUMNS = 79  # of a line for people


def say(text: str) -> None:
    """Print a line, above a bar where one is shown; broken after a comma where a terminal is not wide enough."""
    parts = ", ".join(part.replace(" ", "\xa0") for part in text.split(", "))  # a break is made at plain spaces alone
    lines = textwrap.wrap(parts, COLUMNS, subsequent_indent="  ", break_on_hyphens=False)
    tqdm.write("\n".join(lines).replace("\xa0", " "))
    sys.stdout.flush()


def watched(batches: Iterable[Any], count: int, what: str) -> Iterable[Any]:
    """``batches``, ``count`` of them, with a bar that goes when they are done; none where standard error is no
    terminal."""
    hidden = None if processes.first() else True  # None: where there is no terminal
    return tqdm(batches, what, count, leave=False, ncols=COLUMNS, unit="batch", disable=hidden)


class Progress:
    """A bar on a terminal; where standard error is none, a line now and then; nothing where it is not ``shown``."""

    def __init__(self, total: int, done: int, shown: bool = True):
        self.total, self.started, self.first, self.shown = total, time.perf_counter(), done, shown
        self.printed = self.started
        terminal = shown and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit="step", ncols=COLUMNS) if terminal else None

    def update(self, step: int, loss: float, rate: float) -> None:
        """``step`` steps are done; ``rate`` is in tokens per second."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tok/s", refresh=False)
            self.bar.update(step - self.bar.n)
        elif self._due(step):
            self.printed = time.perf_counter()
            left = (self.printed - self.started) / (step - self.first) * (self.total - step)
            line = f"step {step:>{len(str(self.total))}}/{self.total}  loss {loss:.4f}  {rate:,.0f} tokens/s"
            print(f"{line}  {duration(left)} left", file=sys.stderr, flush=True)

    def _due(self, step: int) -> bool:
        return self.shown and (step in (self.first + 1, self.total) or time.perf_counter() - self.printed >= 10)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """
    >>> duration(9.4), duration(75), duration(3700)
    ('9 s', '1 min 15 s', '1 h 01 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
