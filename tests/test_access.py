"""Keys and limits by table, with a clock that stands still until it is told to go on."""

from __future__ import annotations

import pytest

from mer.api.access import Access, AuthenticationError, RateLimitError
from mer.api.settings import read_keys
from mer.errors import ConfigError


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def ask(access, caller):
    with access.admitted(caller):
        pass


def test_a_minute_s_requests_may_come_at_once_and_then_one_by_one(clock):
    access = Access({}, rate_limit=6, clock=clock)
    for _ in range(6):
        ask(access, "ann")
    with pytest.raises(RateLimitError, match="6 requests a minute") as error:
        ask(access, "ann")
    assert error.value.retry_after == pytest.approx(10)
    ask(access, "bob")
    clock.now += 9.9
    with pytest.raises(RateLimitError, match="in 1 s"):  # as Retry-After says it
        ask(access, "ann")
    clock.now += 0.2
    ask(access, "ann")
    with pytest.raises(RateLimitError):
        ask(access, "ann")
    clock.now += 3600
    for _ in range(6):
        ask(access, "ann")
    with pytest.raises(RateLimitError):
        ask(access, "ann")


def test_requests_at_a_time(clock):
    access = Access({}, max_concurrent=2, clock=clock)
    with access.admitted("ann"), access.admitted("ann"):
        with pytest.raises(RateLimitError, match="2 of your requests") as error:
            ask(access, "ann")
        assert error.value.retry_after > 0
        ask(access, "bob")
    with pytest.raises(ZeroDivisionError), access.admitted("ann"):
        raise ZeroDivisionError
    with access.admitted("ann"), access.admitted("ann"):
        pass


def test_a_refused_request_costs_nothing(clock):
    access = Access({}, rate_limit=3, max_concurrent=1, clock=clock)
    with access.admitted("ann"):
        for _ in range(5):
            with pytest.raises(RateLimitError):
                ask(access, "ann")
    ask(access, "ann")
    ask(access, "ann")


def test_callers_are_forgotten_but_not_while_they_are_served(clock, monkeypatch):
    monkeypatch.setattr("mer.api.access._REMEMBERED", 50)
    access = Access({}, rate_limit=100, max_concurrent=1, clock=clock)
    with access.admitted("ann"):
        for i in range(1000):
            ask(access, f"caller {i}")
        assert len(access._accounts) <= 51
        with pytest.raises(RateLimitError):
            ask(access, "ann")


def test_keys():
    access = Access({"secret": "ann", "schlüssel": "bob"})
    assert access.caller("secret", "1.2.3.4") == "ann"
    assert access.caller("schlüssel", "1.2.3.4") == "bob"
    for key in (None, "", "Secret", "secret ", "secre"):
        with pytest.raises(AuthenticationError):
            access.caller(key, "1.2.3.4")
    assert Access({}).caller("anything", "1.2.3.4") == "1.2.3.4"


def test_keys_of_files_and_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# comment\n\nann  k1\nk2\n  bob k3  \n")
    assert read_keys(file, None) == {"k1": "ann", "k2": "key 2", "k3": "bob"}
    assert read_keys(None, "a, b,,") == {"a": "key 1", "b": "key 2"}
    assert read_keys(file, "a") == {"a": "key 1", "k1": "ann", "k2": "key 3", "k3": "bob"}
    assert read_keys(None, None) == read_keys(None, "") == {}
    for nothing in " ", ",", "\n":  # a secret that came out empty must not open the server to all
        with pytest.raises(ConfigError, match="MER_API_KEYS: no key"):
            read_keys(None, nothing)
