"""What a comparison measured of each method, from its ``table.json``: any key of it may be absent.

    {"command": "...", "model": "...", "rows": [{"method": "lora", "metric": "among_choices",
     "gain": {"mean": 0.12, "std": 0.02}, "forgetting": {"newspaper": {"mean": 0.3}},
     "latency": {"token": 1.02, "merged_token": 1.0}, "adapter_bytes": 3702766, "trainable": 921600}]}
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from peft_jax.errors import PeftJaxError

# Rows are called after experiments; this is the method where that has another name.
TRAINS = {"adapter": "houlsby"}


class Figures(NamedTuple):
    """origin: what measured them, and on which model, "nothing" without rows. rows: a mapping for each method. gains:
    {method: (mean, standard deviation, 0 where there was but one run)}."""

    origin: str
    rows: dict[str, Mapping[str, Any]]
    gains: dict[str, tuple[float, float]]

    def place(self, method: str) -> tuple[int, float]:
        """Sorts methods by gain: those within one standard deviation of the best alike, what is not measured last.

        >>> rows = [{"method": "a", "gain": {"mean": 3, "std": 1}}, {"method": "b", "gain": 2.5}]
        >>> found = read_figures({"rows": rows})
        >>> found.place("a") == found.place("b"), found.place("c")
        (True, (2, 0.0))
        """
        if method not in self.gains:
            return (2, 0.0)
        best, spread = max(self.gains.values())
        mean, _ = self.gains[method]
        return (0, 0.0) if mean >= best - spread else (1, -mean)

    def reasons(self, method: str) -> list[tuple[str, str]]:
        """(words, source) of each figure that there is of a method."""
        if method not in self.rows:
            return [("not measured", f"comparison: no row for it, {self.origin}")] if self.rows else []
        row, found = self.rows[method], []
        if method in self.gains:
            deviation = _number(_mapping(row, "gain").get("std"))
            spread = "" if deviation is None else f" (deviation {deviation:.3f})"
            found.append(f"{row.get('metric', 'the metric')} {self.gains[method][0]:+.3f}{spread}")
        for text, change in _mapping(row, "forgetting").items():
            if (size := _number(change)) is not None:
                found.append(f"loss on {text} {size:+.3f}")
        for name, words in (("token", "a token"), ("merged_token", "a token once merged")):
            if (ratio := _number(_mapping(row, "latency").get(name))) is not None:
                found.append(f"{words} takes {ratio:.2f} of the base's time")
        if (size := _number(row.get("adapter_bytes"))) is not None:
            found.append(f"its file has {size / 1e6:.1f} MB")
        return [(words, f"comparison: row {row['method']}, {self.origin}") for words in found]



def read_figures(table: Mapping[str, Any]) -> Figures:
    """The figures of a comparison's table. Raises ``PeftJaxError`` where it is none."""
    rows = table.get("rows", []) if isinstance(table, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise PeftJaxError("recommend: figures are the table.json of a comparison, a mapping with a list 'rows' of "
                           "mappings: give that file.")
    by_method = {TRAINS.get(name, name): row for row in rows if (name := str(row.get("method", "")))}
    gains = {name: (mean, _number(_mapping(row, "gain").get("std")) or 0.0) for name, row in by_method.items()
             if (mean := _number(row.get("gain"))) is not None}
    named = (table.get("command"), f"on {table['model']}" if table.get("model") else "")
    origin = " ".join(str(one) for one in named if one) or ("a table that does not say" if by_method else "nothing")
    return Figures(origin, by_method, gains)


def _mapping(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = row.get(key)
    return found if isinstance(found, Mapping) else {}


def _number(value: Any) -> float | None:
    """A finite number, or the mean of a mapping that has one; else nothing."""
    value = value.get("mean") if isinstance(value, Mapping) else value
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return float(value) if usable else None
