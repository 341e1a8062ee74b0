"""Stop strings: what is streamed is the whole text, cut before the first stop string; nothing is ever taken back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmc.runtime.stopping import StopStrings

LETTERS = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: grow the text by letters until it ends with a stop string; of several, the longest."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def stream(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    matcher = StopStrings(stops)
    shown = [matcher.push(piece) for piece in pieces]
    return [*shown, matcher.flush()], matcher.stopped


@given(st.lists(LETTERS, max_size=12), STOPS)
def test_streamed_is_cut_whole(pieces: list[str], stops: list[str]) -> None:
    shown, stopped = stream(pieces, stops)
    assert ("".join(shown), stopped) == cut("".join(pieces), stops)


@given(st.lists(LETTERS, max_size=12), STOPS)
def test_only_what_may_become_a_stop_string_is_held(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = seen = ""
    for piece in pieces:
        shown, seen = shown + matcher.push(piece), seen + piece
        if matcher.stopped:
            break
        held = seen[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_over_three_tokens() -> None:
    assert stream(["one E", "N", "D two"], ["END"]) == (["one ", "", "", ""], True)


def test_a_beginning_that_comes_to_nothing_is_shown() -> None:
    assert stream(["aE", "N", "X"], ["END"]) == (["a", "", "ENX", ""], False)
    assert stream(["aEN"], ["END"]) == (["a", "EN"], False)
