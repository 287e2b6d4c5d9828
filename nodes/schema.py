"""What every node's schema has in common, on hosts that differ in what they know."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

__all__ = ["CATEGORY", "schema"]

CATEGORY = "ZigMa"


def schema(**facts) -> io.Schema:
    """An `io.Schema` in our category, without what this host's class has no field for (search_aliases on older ones).

    Raises:
        TypeError: for a name that no known host has a field for: a misspelling would be dropped in silence.
    """
    known = {field.name for field in dataclasses.fields(io.Schema)}
    strange = facts.keys() - known - {"search_aliases"}
    if strange:
        raise TypeError(f"got {', '.join(sorted(strange))}, expected fields of io.Schema")
    return io.Schema(**{name: value for name, value in {"category": CATEGORY, **facts}.items() if name in known})
