"""Prompt lookup: what followed where the text was before as it is now."""

from __future__ import annotations

import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mer._ext.acceptance import Acceptance
from mer._ext.lookup import NgramDrafter, TextIndex


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ("abcdefg", 4, None),
        ("abcdxab", 3, ("cdx", 4)),
        ("xabcyabczabc", 2, ("za", 3)),  # the latest
        ("12345a12345b12345", 1, ("b", 2)),
        ("x12345a92345b12345", 1, ("a", 2)),  # the longest
        ("5a12345b2345", 1, ("b", 3)),
        ("ababab", 5, ("ababa", 3)),  # beyond its end it goes on as it went
        ("aaaaaaa", 3, ("aaa", 2)),
        ("abcdefgh1abcdefgh", 1, ("1", 1)),
        (2 * ("x" + string.ascii_lowercase), 2, ("xa", 0)),
        ("abcab", 0, ("", 4)),
        ("a", 3, None),
    ],
)
def test_what_stood_there_before_is_drafted(text, most, expected):
    drafter = NgramDrafter([ord(letter) for letter in text])
    kind = drafter.look(Acceptance(), Acceptance())
    found = "".join(map(chr, drafter.draft(most)))
    assert (found, kind) == (expected or ("", -1))


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 60))
def test_it_does_not_matter_when_it_looks(tokens, first):
    grown = tokens[:first]
    early = NgramDrafter(grown)
    nobody = Acceptance()
    early.look(nobody, nobody)
    grown += tokens[first:]
    late = NgramDrafter(list(tokens))
    assert early.look(nobody, nobody) == late.look(nobody, nobody)
    assert early.draft(4) == late.draft(4)


@given(st.lists(st.integers(0, 2), max_size=80), st.integers(0, 40))
def test_the_longest_match_is_found(tokens, repeated):
    """By trying all places, the latest first."""
    tokens = tokens + tokens[: repeated % (len(tokens) + 1)]
    best = (0, 0)
    for start in range(len(tokens) - 1, 1, -1):
        length = next((n for n in range(start) if tokens[start - 1 - n] != tokens[-1 - n]), start)
        if min(length, 64) > max(best[1], 1):
            best = start, min(length, 64)
    assert TextIndex(tokens).find() == best


def test_long_texts_are_looked_at_as_they_grow():
    draws = random.Random(3)
    tokens = [draws.randrange(200_000) for _ in range(5000)]
    index, text = TextIndex(grown := tokens[:3]), tokens[:3]
    for token in tokens[3:]:
        grown.append(token)
        index.find()
    grown += tokens[1000:1100]
    assert index.find() == (1100, 64)
    assert text == tokens[:3]
