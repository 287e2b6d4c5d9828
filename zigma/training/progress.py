"""Progress bars for work of several kinds, one bar for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Progress", "named", "progress_bars"]

Progress = Callable[[str, int, int], None]  # (what, done, of how many)


def named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    """The same for one kind of work."""
    return None if progress is None else lambda done, total: progress(what, done, total)


@contextmanager
def progress_bars(show: bool = True) -> Iterator[Progress | None]:
    """What draws a bar for whatever is going on; None where nothing is to be shown."""
    if not show:
        yield None
        return
    from tqdm import tqdm

    bars: dict[str, tqdm] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = tqdm(desc=what, total=total, delay=0.5)
        bars[what].update(done - bars[what].n)
        if done >= total:
            bars.pop(what).close()

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()
