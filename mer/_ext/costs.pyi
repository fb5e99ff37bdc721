"""What steps take by their number of tokens, and how many drafted tokens pay by that. Pure arithmetic."""

class Curve:
    """Seconds by the number of tokens."""

    def curve(self, most: int) -> list[float]:
        """Of steps of 0, 1, ..., `most` tokens; 0 where nothing was measured."""

class Costs(Curve):
    """Seconds of a step by its tokens, as measured, medians; between and beyond by a straight line."""

    def __init__(self, most: float = 0.0) -> None:
        """most: what is counted can't be more, and the line beyond what was measured bends; 0: no bound."""

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of so many took so long. Raises ValueError for fewer than none."""

    def age(self) -> None:
        """One more step: what was measured long ago is forgotten."""

    def __contains__(self, tokens: int) -> bool: ...
    def __call__(self, tokens: int) -> float:
        """Of a step of so many; 0 where nothing was measured."""

class StepCosts(Curve):
    """Seconds of a step by its tokens: what is computed, and what is waited for.

    The wait is that of the latest steps for an expert that they wanted, whatever their width, times the
    experts that a step of that width wants. So a cache that fills, or shrinks, changes all widths at once,
    also those that were not measured since. What reads take while something is computed is no wait.
    Experts that drafted tokens alone want are missed more often than those of plain steps, which others want,
    too: how much more is waited for one of them is learnt beside.
    """

    def __init__(self, experts: float = 0.0) -> None:
        """experts: of all layers; 0: not known."""

    def observe(self, tokens: int, seconds: float, wait: float, experts: float, plain: int = 0) -> None:
        """A step of so many took `seconds`, of them `wait` for reads, and wanted so many experts.

        plain: how many of its tokens were not drafted; 0: all.
        """

    def __contains__(self, tokens: int) -> bool: ...
    def __call__(self, tokens: int) -> float:
        """Of a step of so many; 0 where nothing was measured."""

def best_lengths(
    costs: Curve,
    chains: list[tuple[float, ...]],
    room: int,
    asked: list[bool] | None = None,
    prices: Costs | None = None,
) -> tuple[float, list[int]]:
    """(Tokens per second, how many of each chain): what is best, beside a step without drafts.

    costs: of steps, one of so many tokens as there are chains is known. chains: see Acceptance.chances, of
    each sequence. room: for so many drafted tokens in all. asked: whose chain an engine drafts, which takes
    for each token as long as `prices` says, by how many texts it drafts for.
    """
