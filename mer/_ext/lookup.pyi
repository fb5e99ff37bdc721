"""Prompt lookup: where a text, prompt and answer, stood before as it ends now."""

from mer._ext.acceptance import Acceptance

SHORTEST: int  # tokens of a match

class TextIndex:
    """Looks at `tokens`, to which others append. Takes 12 bytes for each of them, up to twice that."""

    def __init__(self, tokens: list[int]) -> None:
        """Nothing is looked at yet."""

    def find(self) -> tuple[int, int]:
        """What comes behind the place at which the text was for longest as it is at its end now.

        (Its first token's position, how many tokens before it are the same; 64 stands for more.) Of equally
        long matches the latest. (0, 0) where the last two tokens did not stand together before. Of places
        behind the same two tokens the latest 64 are looked at.
        """

class NgramDrafter:
    """Drafts what followed when the text was last as it is now, for as many tokens as can be.

    What it finds and no step verifies is compared with what comes.
    """

    def __init__(self, tokens: list[int]) -> None:
        """tokens: prompt and answer, which others append to."""

    def look(self, own: Acceptance, everybody: Acceptance) -> int:
        """The kind of what it finds (see mer._ext.acceptance) behind the text as it is now; -1: nothing.

        own, everybody: told of what was right of an earlier find.
        """

    def draft(self, most: int) -> list[int]:
        """So many tokens of what the last `look` found."""

    def verified(self) -> None:
        """A step verifies what was found."""
