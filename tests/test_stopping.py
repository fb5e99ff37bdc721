"""Stop strings against a search in the whole text."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mer.errors import RequestError
from mer.model.stopping import StopStrings

_LETTERS = st.text("ab\n你", max_size=4)
STOPS = st.lists(_LETTERS.filter(bool), max_size=4)
PIECES = st.lists(_LETTERS, max_size=20)


def stream(stops: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    """What was shown for each piece, until the end; the stop string that ended it."""
    stopping = StopStrings(stops)
    shown = []
    for piece in pieces:
        text, ended = stopping.push(piece)
        shown.append(text)
        if ended is not None:
            assert stopping.push("after the end") == ("", None)
            assert stopping.finish() == ""
            return shown, ended
    return [*shown, stopping.finish()], None


def first_stop(stops: list[str], text: str) -> tuple[str, str | None]:
    """The shortest beginning of the text that ends in a stop string, less the longest such."""
    if stops:
        longest = sorted(map(re.escape, stops), key=len, reverse=True)
        for end in range(len(text) + 1):
            if match := re.search(f"(?:{'|'.join(longest)})\\Z", text[:end]):
                return text[: match.start()], match[0]
    return text, None


@given(stops=STOPS, pieces=PIECES)
@example(stops=["aab"], pieces=["a", "a", "a", "b"])
@example(stops=["ab", "b"], pieces=["ab"])
@example(stops=["aba", "b"], pieces=["a", "ba"])
@example(stops=["\n\n"], pieces=["a\n", "b\n", "\n"])
def test_cut_at_the_first_stop_string(stops: list[str], pieces: list[str]) -> None:
    shown, ended = stream(stops, pieces)
    assert ("".join(shown), ended) == first_stop(stops, "".join(pieces))


@given(stops=STOPS, pieces=PIECES)
def test_only_the_beginning_of_a_stop_string_is_held_back(stops: list[str], pieces: list[str]) -> None:
    stopping = StopStrings(stops)
    given, shown = "", ""
    for piece in pieces:
        text, ended = stopping.push(piece)
        if ended is not None:
            break
        given, shown = given + piece, shown + text
        held = given[len(shown) :]
        assert given.startswith(shown)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
        # What is shown could not have been the beginning of a stop string together with what follows it.
        longer = [given[-n:] for n in range(len(held) + 1, len(given) + 1)]
        assert not any(stop.startswith(end) for end in longer for stop in stops)


def test_without_stop_strings_everything_is_shown_at_once() -> None:
    assert stream([], ["a", "", "b"]) == (["a", "", "b", ""], None)


def test_an_empty_stop_string() -> None:
    with pytest.raises(RequestError, match="empty stop string") as caught:
        StopStrings(["a", ""])
    assert caught.value.param == "stop"
