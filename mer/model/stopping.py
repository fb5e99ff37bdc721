"""Stop strings: where an answer ends, seen as its text comes."""

from __future__ import annotations

from collections.abc import Sequence

from mer.errors import RequestError


class StopStrings:
    """Cuts a stream of text at the first stop string and holds back what may be the beginning of one.

    "First" is the one that ends first, whatever the pieces that the text comes in; of several that end at the
    same character, the one that begins first. The stop string itself is not shown.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises RequestError for an empty stop string."""
        if not all(stops):
            raise RequestError("stop: an empty stop string would end every answer at once", "stop")
        self._stops = tuple(dict.fromkeys(stops))
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._ended = False

    def push(self, text: str) -> tuple[str, str | None]:
        """(Text that may be shown now, the stop string that ended the answer or None).

        After a stop string nothing more is shown.
        """
        if not self._stops:
            return text, None
        if self._ended:
            return "", None
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, stop = min(found)
            shown, self._held = self._held[:at], ""
            self._ended = True
            return shown, stop
        keep = self._beginning()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, None

    def finish(self) -> str:
        """What is still held back: the answer ended without a stop string."""
        shown, self._held = self._held, ""
        return shown

    def _beginning(self) -> int:
        """Length of the longest end of the text that some stop string begins with."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
