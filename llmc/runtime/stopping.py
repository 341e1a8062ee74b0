"""Where a completion ends: stop strings, which may span tokens and are cut from the text."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on piece by piece and ends it before the first stop string.

    First is what is complete first; of several that end together, the longest. Text that may be the beginning of a
    stop string is held until that is decided, so what was passed on never has to be taken back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that may be shown now; after a stop string, nothing more."""
        if self.stopped:
            return ""
        text = self._held + text
        end, start = min(
            ((at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0), default=(-1, len(text))
        )
        self.stopped = end >= 0
        keep = 0 if self.stopped else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: min(start, len(text) - keep)]

    def flush(self) -> str:
        """What is held, when nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest proper beginning of `stop` that `text` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
