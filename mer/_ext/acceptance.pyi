"""How often drafted tokens are right: by kind of draft, and by their position in it."""

MOST_DRAFTED: int  # tokens of one request in one step
LOOKUPS: int  # kinds of prompt lookup, from 0: by how long a match is, the longest first
DRAFT_MODEL: int
TIED: int

class Acceptance:
    """What became of drafts, of one request or of all."""

    def note(self, kind: int, position: int, right: bool) -> None:
        """A drafted token behind `position` right ones was right, or wrong."""

    def judge(self, kind: int, drafted: int, right: int, everybody: Acceptance) -> None:
        """Of so many drafted tokens the first `right` ones were; what everybody knows learns that, too."""

    def chances(self, kind: int, everybody: Acceptance) -> tuple[float, ...]:
        """That a draft of this kind is right up to its first, second, ... token; the hopeless ones left out.

        A request's own experience counts beside that of all, and where there is none at a position yet, it
        is thought to be as the one before.
        """
