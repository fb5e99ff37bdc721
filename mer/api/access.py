"""Who may ask, how often, and how much at a time. Knows nothing of HTTP or gRPC."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from attrs import define

from mer.errors import MerError

# Why requests are refused: what a server counts.
REASONS: Final = (
    "invalid", "too_large", "auth", "host", "rate_limit", "queue_full", "loading", "shutting_down",
    "engine_failed",
)  # fmt: skip
# Callers that are remembered; of more, those that are idle for longest are forgotten.
_REMEMBERED: Final = 10_000


class AuthenticationError(MerError):
    """No key, or one that is not known."""


class RateLimitError(MerError):
    """One caller asks too often or too much at a time. retry_after: seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@define
class _Account:
    """A caller's bucket of requests, which fills while time goes by, and what it has running."""

    tokens: float
    at: float
    running: int = 0


class Access:
    """Keys and limits. Used on the event loop alone.

    refused: reason -> requests; who serves them counts.

    keys: key -> name; empty: no key is asked for. rate_limit: requests a minute of one caller, which may
    come at once after a minute of silence. max_concurrent: requests of one caller at a time.
    """

    def __init__(
        self,
        keys: Mapping[str, str],
        *,
        rate_limit: int | None = None,
        max_concurrent: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replace(keys)
        self._rate = rate_limit
        self._max_concurrent = max_concurrent
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self.refused: dict[str, int] = dict.fromkeys(REASONS, 0)

    def replace(self, keys: Mapping[str, str]) -> None:
        """These keys count from now on."""
        self._keys = [(_digest(key), name) for key, name in keys.items()]

    def caller(self, key: str | None, address: str) -> str:
        """The name of the caller: that of its key, or its address where no keys are asked for.

        Raises AuthenticationError.
        """
        if not self._keys:
            return address
        if not key:
            raise AuthenticationError("an API key is needed: send it as 'Authorization: Bearer KEY'")
        given, found = _digest(key), None
        # All are compared, and each in constant time: how long it takes tells nothing of any key.
        for digest, name in self._keys:
            if hmac.compare_digest(given, digest):
                found = name
        if found is None:
            raise AuthenticationError("this API key is not known")
        return found

    @contextmanager
    def admitted(self, caller: str) -> Iterator[None]:
        """While a request of this caller is served. Raises RateLimitError."""
        account = self._account(caller)
        if self._max_concurrent is not None and account.running >= self._max_concurrent:
            raise RateLimitError(
                f"{account.running} of your requests are running, and no more are allowed at a time; "
                "wait until one has ended",
                retry_after=1.0,
            )
        if self._rate is not None:
            if account.tokens < 1:
                wait = (1 - account.tokens) * 60 / self._rate
                raise RateLimitError(
                    f"{self._rate} requests a minute are allowed; try again in {math.ceil(wait)} s",
                    retry_after=wait,
                )
            account.tokens -= 1
        account.running += 1
        try:
            yield
        finally:
            account.running -= 1

    def _account(self, caller: str) -> _Account:
        """That of `caller`, filled up to now, and behind all others in the order of their last use."""
        now = self._clock()
        full = float(self._rate or 0)
        account = self._accounts.pop(caller, None) or _Account(full, now)
        account.tokens = min(full, account.tokens + (now - account.at) * full / 60)
        account.at = now
        if len(self._accounts) >= _REMEMBERED:
            for name in [name for name, each in self._accounts.items() if not each.running][:100]:
                del self._accounts[name]
        self._accounts[caller] = account
        return account


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
