"""The program around the panels: asks the server, draws, obeys keys."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import ClassVar, Final

from rich.text import Text
from textual import events, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widgets import Static

from mer.cli.dashboard import heat, panels
from mer.cli.moments import Moment, watch
from mer.cli.remote import Remote, RemoteError
from mer.v1 import inference_pb2 as pb

# Seconds until a server that is gone is asked again.
_AGAIN: Final = 2.0
_HISTORY: Final = 300


class Dashboard(App[RemoteError | None]):
    """Runs until it is left; the result is why it could not begin, if that is so."""

    # The terminal's own colours, so that it can be read on any.
    CSS = """
    Screen { layout: vertical; }
    Static { width: 1fr; text-wrap: nowrap; text-overflow: clip; }
    #title, #keys { height: 1; }
    #above { height: 1fr; min-height: 13; padding-top: 1; }
    #speed, #heat { height: 100%; }
    #speed { width: 42; padding-right: 1; }
    #requests { height: 1fr; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [Binding("q,escape", "quit", "quit")]

    def __init__(self, remote: Remote, interval: float) -> None:
        super().__init__()
        self.theme = "ansi-dark"
        self._remote = remote
        self._interval = interval
        self._now: tuple[pb.WatchResponse, Moment] | None = None
        self._speeds: deque[float] = deque(maxlen=_HISTORY)

    def compose(self) -> ComposeResult:
        yield Static(f"asking {self._remote.address} ...", id="title")
        with Horizontal(id="above"):
            yield Static(id="speed")
            yield Static(id="heat")
        yield Static(id="requests")
        yield Static(id="keys")

    def on_mount(self) -> None:
        self.say("")
        self.follow()

    def on_resize(self, _: events.Resize) -> None:
        self.call_after_refresh(self._draw)

    @work
    async def follow(self) -> None:
        """What the server says, until the program ends."""
        while True:
            try:
                async with self._remote.channel() as channel:
                    async for found in watch(self._remote, channel, self._interval):
                        self._now = found
                        self._speeds.append(found[1].tokens_per_s)
                        self.say("")
                        self._draw()
            except RemoteError as error:
                if self._now is None:
                    self.exit(error)
                    return
                self.say(f"{error}; trying again")
            await asyncio.sleep(_AGAIN)

    def say(self, text: str) -> None:
        """In the last line, beside the keys."""
        keys = Text.assemble(("q", "bold"), " quit  ", (text, "bold red"), no_wrap=True)
        self.query_one("#keys", Static).update(keys)

    def _draw(self) -> None:
        if self._now is None:
            return
        answer, now = self._now
        self._show("title", [panels.title(now, self._remote.address)])
        self._show("speed", panels.speed(now, self._speeds, self._room("speed")[0]))
        self._show("heat", self._heat(answer))
        self._show("requests", panels.requests(now, self._room("requests")[1]))

    def _heat(self, answer: pb.WatchResponse) -> list[Text]:
        if not answer.HasField("experts"):
            return []
        width, height = self._room("heat")
        legend = Text(heat.LEGEND, "dim", no_wrap=True)
        return [*heat.heat_map(answer.experts, width, height - 1), legend]

    def _room(self, name: str) -> tuple[int, int]:
        """Columns and lines."""
        size = self.query_one(f"#{name}", Static).content_size
        return size.width, size.height

    def _show(self, name: str, lines: list[Text]) -> None:
        self.query_one(f"#{name}", Static).update(Text("\n").join(lines))
