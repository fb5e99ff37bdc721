"""What the dashboard says, as lines of text of a given width.

Colours are the terminal's own, and say nothing that the text does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from rich.text import Text

from mer.cli.common import percent, rate, seconds, size
from mer.cli.moments import Latency, Moment, PeerLine, VramLine

_SPARKS: Final = "▁▂▃▄▅▆▇█"
_LABEL: Final = 8
# How time was spent: sign, colour.
_TIME: Final = {
    "experts": ("█", "green"),
    "waits": ("▓", "red"),
    "other": ("▒", "cyan"),
    "idle": ("·", "dim"),
}


def title(now: Moment, address: str) -> Text:
    """The first line."""
    minutes, second = divmod(int(now.uptime_s), 60)
    hours, minute = divmod(minutes, 60)
    made = Text.assemble(
        ("mer top  ", "dim"), (now.model, "bold"), f" at {address}  up {hours}:{minute:02}:{second:02}  ",
        (f"{now.running} running, {now.waiting} waiting", "bold"),
    )  # fmt: skip
    if now.paused:
        made.append("  PAUSED", "bold red")
    return made


def speed(now: Moment, history: Sequence[float], width: int) -> list[Text]:
    """Tokens a second, latencies, where time goes, reads, and how full each tier is."""
    spent = now.time_share
    shares = {"experts": spent.experts, "waits": spent.io_wait, "other": spent.other, "idle": spent.idle}
    room = width - _LABEL
    lines = [
        _line("speed", f"{now.tokens_per_s:.1f} tok/s ", (spark(history, room - 14), "green")),
        _line("", f"{now.steps_per_s:.1f} steps/s, {now.computed_tokens_per_s:.0f} computed/s"),
        Text(" " * _LABEL + _columns(("50 %", "90 %", "99 %")), "dim", no_wrap=True),
        _line("first", _latency(now.first_token)),
        _line("next", _latency(now.next_token)),
        _line("time", *stacked(shares, room)),
        _line("", *_legend(shares, ("experts", "waits"))),
        _line("", *_legend(shares, ("other", "idle"))),
        _line("reads", _reads(now)),
    ]
    hits = f", {percent(now.expert_hit_rate)} hits" if now.expert_hit_rate is not None else ""
    if now.experts:
        told = f"{now.experts_resident} of {now.experts}{hits}"
        lines.append(_line("experts", *bar(now.experts_resident, now.cache_slots, room, told)))
    else:
        lines.append(_line("experts", "none: a dense model"))
    if now.vram is not None:
        lines += _vram(now.vram, room)
    if now.peers:
        lines += _peers(now, room)
    blocks = f"{now.kv_blocks_used}+{now.kv_blocks_cached} of {now.kv_blocks}"
    if now.prefix_hit_rate is not None:
        blocks += f", {percent(now.prefix_hit_rate)} hits"
    lines.append(_line("KV", *bar(now.kv_blocks_used, now.kv_blocks, room, blocks)))
    memory = f"{size(now.resident_bytes)} of {size(now.ram_budget_bytes)}"
    lines.append(_line("memory", *bar(now.resident_bytes, now.ram_budget_bytes, room, memory)))
    return lines


def _vram(vram: VramLine, room: int) -> list[Text]:
    if vram.lost is not None:
        return [_line("VRAM", (f"given up: {vram.lost}", "red"))]
    lines = []
    if vram.slots:
        share = "" if vram.computed_share is None else f", {percent(vram.computed_share)} computed"
        told = f"{vram.resident} of {vram.slots}{share}"
        lines.append(_line("VRAM", *bar(vram.resident, vram.slots, room, told)))
    if vram.layers:
        dense = f"{vram.layers} dense layers {size(vram.dense_bytes)}, KV {size(vram.kv_bytes)}"
        lines.append(_line("" if lines else "VRAM", dense))
    return lines


def _peers(now: Moment, room: int) -> list[Text]:
    """All of them together, and the first that is not there."""
    up = sum(each.condition == "up" for each in now.peers)
    held, capacity = (
        sum(value) for value in zip(*((each.held, each.capacity) for each in now.peers), strict=True)
    )
    share = "" if now.peer_share is None else f", {percent(now.peer_share)} computed"
    told = f"{up} of {len(now.peers)} up, {held} experts{share}"
    lines = [_line("peers", *bar(held, capacity, room, told))]
    away: list[PeerLine] = [each for each in now.peers if each.condition != "up"]
    if away:
        lines.append(_line("", (f"{away[0].address} {away[0].condition} {away[0].error}"[:room], "red")))
    return lines


def requests(now: Moment, height: int) -> list[Text]:
    """A head and a line each, the oldest first; the last line says how many there was no room for."""
    lines = [Text("    id  state      prompt  cached  computed   drawn    tok/s      age", "dim")]
    room = height - 1
    shown = now.requests if len(now.requests) <= room else now.requests[: max(room - 1, 0)]
    for each in shown:
        colour = {"decode": "green", "prefill": "cyan", "queued": "dim"}.get(each.state, "red")
        pace = each.completion_tokens / each.age_s if each.age_s > 0 else 0.0
        lines.append(
            Text.assemble(
                f"{each.id:6}  ", (f"{each.state:9}", colour), f"{each.prompt_tokens:8}{each.cached_tokens:8}"
                f"{each.computed_tokens:10}{each.completion_tokens:8}{pace:9.1f}{each.age_s:8.1f}s",
            )
        )  # fmt: skip
    if len(shown) < len(now.requests):
        lines.append(Text(f"        and {len(now.requests) - len(shown)} more", "dim"))
    return lines


def spark(values: Iterable[float], width: int) -> str:
    """The last `width` values, the highest of which is a full block."""
    last = list(values)[-width:] if width > 0 else []
    top = max(last, default=0.0) or 1.0
    return "".join(_SPARKS[round(value / top * (len(_SPARKS) - 1))] for value in last)


def bar(part: float, whole: float, width: int, told: str) -> tuple[tuple[str, str], str]:
    """A bar and what it means, together of this width."""
    cells = max(width - len(told) - 1, 0)
    full = round(cells * min(part / whole, 1.0)) if whole else 0
    return ("█" * full + "░" * (cells - full), "green"), f" {told}"


def stacked(shares: dict[str, float], width: int) -> list[tuple[str, str]]:
    """One bar of several shares that make 1."""
    found, at, total = [], 0, 0.0
    for name, share in shares.items():
        total += share
        end = min(round(total * width), width)
        sign, colour = _TIME[name]
        found.append((sign * (end - at), colour))
        at = end
    return found


def _legend(shares: dict[str, float], names: tuple[str, ...]) -> list[tuple[str, str] | str]:
    found: list[tuple[str, str] | str] = []
    for name in names:
        found += [_TIME[name], f" {name:8}{percent(shares[name]):>4}   "]
    return found


def _line(label: str, *parts: str | tuple[str, str]) -> Text:
    return Text.assemble((f"{label:{_LABEL}}", "dim"), *parts, no_wrap=True)


def _latency(given: Latency) -> str:
    if given.p50 is None:
        return "-"
    return _columns(seconds(each) for each in (given.p50, given.p90, given.p99))


def _columns(cells: Iterable[str]) -> str:
    return "".join(f"{cell:11}" for cell in cells)


def _reads(now: Moment) -> str:
    told = f"{rate(now.read_bytes_per_s)}, {now.reads_per_s:.0f}/s, {now.queue_depth:.1f} deep"
    return f"{told}, {now.read_errors} errors" if now.read_errors else told
