"""The program around the panels: asks the server, draws, obeys keys."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import ClassVar, Final

from rich.text import Text
from textual import events, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widgets import Input, Static

from mer.cli.dashboard import heat, panels
from mer.cli.dashboard.operator import Operator
from mer.cli.moments import Moment, watch
from mer.cli.remote import Remote, RemoteError
from mer.v1 import inference_pb2 as pb

# Seconds until a server that is gone is asked again.
_AGAIN: Final = 2.0
_HISTORY: Final = 300
_KEYS: Final = (("q", "quit"), ("p", "pause"), ("i", "pin"), ("r", "reload"))


class Dashboard(App[RemoteError | None]):
    """Runs until it is left; the result is why it could not begin, if that is so."""

    # The terminal's own colours, so that it can be read on any.
    CSS = """
    Screen { layout: vertical; }
    Static { width: 1fr; text-wrap: nowrap; text-overflow: clip; }
    #title { height: 1; }
    #keys { height: auto; max-height: 3; text-wrap: wrap; }
    #above { height: 2fr; min-height: 14; padding-top: 1; }
    #speed, #heat { height: 100%; }
    #speed { width: 42; padding-right: 1; }
    #requests, #log { height: 1fr; }
    #pin { height: 1; border: none; padding: 0; display: none; }
    """
    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = None
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("escape", "leave", "leave"),
        Binding("p", "pause", "pause"),
        Binding("i", "pin", "pin"),
        Binding("r", "reload", "reload"),
    ]

    def __init__(self, remote: Remote, interval: float, admin: Remote | None = None, model: str = "") -> None:
        super().__init__()
        self.theme = "ansi-dark"
        self._remote = remote
        self._interval = interval
        self._model = model
        self._operator = Operator(admin, model) if admin else None
        self._now: tuple[pb.WatchResponse, Moment] | None = None
        self._speeds: deque[float] = deque(maxlen=_HISTORY)
        self._lines: deque[str] = deque(maxlen=_HISTORY)
        self._parts = {
            name: Static(id=name) for name in ("title", "speed", "heat", "requests", "log", "keys")
        }
        self._pin = Input(id="pin", placeholder="pin LAYER or LAYER/EXPERT, or -LAYER/EXPERT to unpin")
        self._said = ""
        self._reloading = False  # r was pressed once

    def compose(self) -> ComposeResult:
        self._parts["title"].update(f"asking {self._remote.address} ...")
        yield self._parts["title"]
        with Horizontal(id="above"):
            yield self._parts["speed"]
            yield self._parts["heat"]
        yield self._parts["requests"]
        if self._operator is not None:
            yield self._parts["log"]
        yield self._pin
        yield self._parts["keys"]

    def on_mount(self) -> None:
        self.say("")
        self.follow()
        if self._operator is not None:
            self.follow_log(self._operator)

    def on_resize(self, _: events.Resize) -> None:
        self.call_after_refresh(self._draw)

    @work
    async def follow(self) -> None:
        """What the server says, until the program ends."""
        lost = False
        while True:
            try:
                async with self._remote.channel() as channel:
                    async for found in watch(self._remote, channel, self._interval, self._model):
                        self._now = found
                        self._speeds.append(found[1].tokens_per_s)
                        if lost:
                            lost = False
                            self.say("the server is back")
                        self._draw()
            except RemoteError as error:
                if self._now is None:
                    self.exit(error)
                    return
                lost = True
                self.say(f"{error}; trying again")
            await asyncio.sleep(_AGAIN)

    @work
    async def follow_log(self, operator: Operator) -> None:
        """The server's log, until the program ends."""
        while True:
            try:
                async for lines in operator.log():
                    self._lines.extend(lines)
                    self._draw()
            except RemoteError as error:
                self._lines.append(str(error))
            await asyncio.sleep(_AGAIN)

    @work
    async def operate(self, doing: Callable[[Operator], Awaitable[str]]) -> None:
        """Ask the admin API for something, and say what came of it."""
        if self._operator is None:
            self.say("give the address of the server's admin API: mer top --admin HOST:PORT")
            return
        self.say("...")
        try:
            self.say(await doing(self._operator))
        except RemoteError as error:
            self.say(str(error))

    def action_leave(self) -> None:
        box = self._pin
        if box.display:
            box.display = False
            self.screen.set_focus(None)
        else:
            self.exit()

    def action_pause(self) -> None:
        paused = self._now is not None and self._now[1].paused
        self.operate(Operator.resume if paused else Operator.pause)

    def action_pin(self) -> None:
        box = self._pin
        box.value, box.display = "", True
        box.focus()

    def action_reload(self) -> None:
        if not self._reloading:
            self._reloading = True
            self.say("press r again to load the model anew")
            return
        self.operate(Operator.reload)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.action_leave()
        self.operate(lambda operator: operator.pin(event.value))

    def say(self, text: str) -> None:
        """In the last line, beside the keys; without a text, what was said last."""
        if text:
            self._said = text
            self._reloading = self._reloading and text.startswith("press r")
        keys = Text.assemble(
            *(part for key, does in _KEYS for part in ((key, "bold"), f" {does}  ")),
            (self._said, "bold red"),
        )
        self._parts["keys"].update(keys)

    def _draw(self) -> None:
        if self._now is None:
            return
        answer, now = self._now
        self._show("title", [panels.title(now, self._remote.address)])
        self._show("speed", panels.speed(now, self._speeds, self._room("speed")[0]))
        self._show("heat", self._heat(answer))
        if self._operator is not None:
            width, height = self._room("log")
            lines = list(self._lines)[-height:] if height else []
            self._show("log", [Text(line[:width], no_wrap=True) for line in lines])
        self._show("requests", panels.requests(now, self._room("requests")[1]))

    def _heat(self, answer: pb.WatchResponse) -> list[Text]:
        if not answer.HasField("experts"):
            return []
        width, height = self._room("heat")
        legend = Text(heat.LEGEND, "dim", no_wrap=True)
        return [*heat.heat_map(answer.experts, width, height - 1), legend]

    def _room(self, name: str) -> tuple[int, int]:
        """Columns and lines."""
        size = self._parts[name].content_size
        return size.width, size.height

    def _show(self, name: str, lines: list[Text]) -> None:
        self._parts[name].update(Text("\n").join(lines))
