"""How long a peer is expected to take."""

from __future__ import annotations

from statistics import geometric_mean

import pytest

from mer.cluster.pace import Pace


def test_averages_by_size():
    pace = Pace()
    assert (pace.expected(8), pace.age(7.0, 8)) == (0, float("inf"))
    pace.note(1.0, 8, 0.001)
    assert pace.expected(8) == pace.expected(15) == pace.expected(200) == pytest.approx(0.001)
    assert pace.expected(7) == 0, "of fewer rows nothing is known"
    pace.note(2.0, 4, 0.016)
    assert pace.expected(7) == pytest.approx(0.016)
    assert (pace.age(5.0, 7), pace.age(5.0, 100)) == (3.0, 4.0)
    pace.note(3.0, 9, 0.016)
    assert pace.expected(8) == pytest.approx(geometric_mean([0.001, 0.001, 0.001, 0.016]))
    pace.note(4.0, 8, 0.0005)
    assert pace.expected(8) == pytest.approx(geometric_mean([0.002, 0.0005]))
    pace.forget()
    assert pace.expected(8) == 0
