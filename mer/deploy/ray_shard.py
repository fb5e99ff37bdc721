"""A shard as an actor of Ray: the one of `mer shard`, in the actor's process."""

from __future__ import annotations

import logging
import os
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any, Final

import ray
from ray.util.metrics import Gauge

from mer.cluster.server import ShardServer, ShardSettings
from mer.cluster.shard import Shard
from mer.deploy.plan import Certificates, Plan
from mer.engine.budget import resident_bytes
from mer.weights.hub import locate

_log = logging.getLogger("mer")

# Seconds between two looks at whether it is well, and so many of them until Ray's dashboard is told again.
_LOOK: Final = 0.5
_LOOKS: Final = 4

# What Ray's dashboard is told, as ray_mer_shard_NAME, of what `state` says.
_GAUGES: Final = {
    "held": "Experts that a shard has in memory",
    "capacity": "Experts that a shard has room for",
}


class ShardActor:
    """Listens once it is made. Ray starts it anew, with the same arguments, when its process ends."""

    def __init__(self, plan: Plan, number: int) -> None:
        """number: from 0. Raises what Shard and ShardServer raise."""
        files = plan.certificates
        host = ray.util.get_node_ip_address() if files is not None else "127.0.0.1"
        port = plan.shard_port + number if plan.shard_port else 0
        settings = ShardSettings(
            listen=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            **({} if files is None else _tls(files)),
        )
        self._number = number
        self._shard = Shard(locate(plan.model), plan.shard_ram, resident_bytes(), threads=plan.shard_cpus)
        self._server = ShardServer(self._shard, settings)
        self._address = settings.listen.rpartition(":")[0] + f":{self._server.port}"
        threading.Thread(target=self._watch, daemon=True).start()

    def address(self) -> str:
        """HOST:PORT, for engines."""
        return self._address

    def state(self) -> dict[str, Any]:
        """What `mer cluster status` shows."""
        return {
            "number": self._number,
            "address": self._address,
            "node": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
            "capacity": self._shard.capacity,
            "held": len(self._shard.held()),
            "experts": self._shard.total,
        }

    def _watch(self) -> None:
        """A shard whose files were changed under it ends, so that Ray starts it with the new ones."""
        gauges = {name: Gauge(f"mer_shard_{name}", text, ("shard",)) for name, text in _GAUGES.items()}
        tags = {"shard": str(self._number)}
        for look in count():
            if self._shard.failed:
                os._exit(1)
            if look % _LOOKS == 0:
                state = self.state()
                for name, gauge in gauges.items():
                    gauge.set(state[name], tags)
            time.sleep(_LOOK)


def _tls(files: Certificates) -> dict[str, Path]:
    return {
        "tls_cert": files.cert,
        "tls_key": files.key,
        "tls_client_ca": files.ca,
        "token_file": files.token,
    }
