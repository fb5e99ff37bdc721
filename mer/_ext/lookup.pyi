"""Where a text stood before as it ends now: prompt lookup's index over prompt and answer."""

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
