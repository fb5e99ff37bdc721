"""By which names a server may be called: against web pages that give their own name this server's address.

A page of attacker.example can make that name resolve to 127.0.0.1 and is then, for the browser, of the same
origin as a server there ("DNS rebinding"). It can't change what the browser sends as Host and Origin.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from mer.api.http.errors import ApiError
from mer.api.settings import ServerSettings, is_loopback


class Hosts:
    """Checks requests of a server that only this machine reaches, or that was told its names."""

    def __init__(self, settings: ServerSettings) -> None:
        self._names = {"localhost", settings.host.lower(), *(_bare(name) for name in settings.allowed_hosts)}
        self._origins = settings.cors_origins
        self._checks = "*" not in self._names and (is_loopback(settings.host) or bool(settings.allowed_hosts))

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises ApiError (403) for a Host or Origin that is not one of this server's names."""
        if not self._checks:
            return
        host, origin = headers.get("host"), headers.get("origin")
        if host and not self._known(_hostname(f"//{host}")):
            raise _refusal(f"this server is not called {host[:100]!r}")
        if origin is None or "*" in self._origins or origin in self._origins:
            return
        if not self._known(_hostname(origin)):
            raise _refusal(f"web pages of {origin[:100]!r} may not ask this server (--cors-origin lets them)")

    def _known(self, name: str) -> bool:
        return name in self._names or is_loopback(name)


def _bare(name: str) -> str:
    """Without a port."""
    return name if name == "*" else _hostname(f"//{name}") or name.lower()


def _hostname(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _refusal(what: str) -> ApiError:
    return ApiError(
        403,
        f"{what}: requests to a server on the loopback address must name localhost or that address, so that "
        "no web page can ask it unnoticed; start it with --allowed-host NAME for other names",
        code="host_not_allowed",
    )
