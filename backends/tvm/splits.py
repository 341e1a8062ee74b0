"""How attention cuts a context: segments, whose scores a kernel holds at once, and splits of whole segments."""

from __future__ import annotations

SEGMENT = 256
"""Keys of a segment."""

MOST_SPLITS = 128


def split_length(longest: int) -> int:
    """Keys of a split, where a sequence has `longest` tokens at most: as few segments as give 128 splits or fewer.

    Short splits let tasks share a context evenly; folding very many would be work of its own."""
    return SEGMENT * -(-longest // (SEGMENT * MOST_SPLITS))
