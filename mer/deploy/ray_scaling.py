"""How many engines there should be, asked by Ray Serve. It takes this module along as it is (by value)."""

from __future__ import annotations

from typing import Any

from mer.deploy.waiting import wanted_engines


class QueueTimePolicy:
    """By what engines report: `queue_seconds` and `running`."""

    def __init__(self, target: float, most: int) -> None:
        """target: seconds; most: requests that an engine computes at a time."""
        self._target, self._most = target, most

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """ctx: ray.serve.config.AutoscalingContext."""
        metrics = ctx.aggregated_metrics or {}
        waits = list(metrics.get("queue_seconds", {}).values())
        running = [round(each) for each in metrics.get("running", {}).values()]
        return wanted_engines(ctx.target_num_replicas, waits, running, self._target, self._most), {}
