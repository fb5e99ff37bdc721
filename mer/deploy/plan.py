"""What a cluster is to be: the same for every node, and checked before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from attrs import field, frozen

from mer.errors import ConfigError

# The application of Ray Serve, and the namespace of the actors.
NAME: Final = "mer"


@frozen(kw_only=True)
class Certificates:
    """Files of shards and engines (PEM, and a token), at the same place on every node."""

    cert: Path
    key: Path
    ca: Path
    token: Path


@frozen(kw_only=True)
class Plan:
    """Sizes in bytes, times in seconds. Raises ConfigError for what can't be."""

    model: str
    """As `mer serve` takes it; the same on every node."""
    model_name: str
    shards: int
    shard_ram: int
    shard_cpus: int = 1
    """Compute threads of each, and what Ray reserves."""
    shard_port: int = 9100
    """Of the first shard, the next one has the next port; 0: free ones."""
    ram: int
    """Of each engine."""
    cpus: int = 1
    replicas: int
    most_replicas: int
    """As many as `replicas`: there is no scaling."""
    queue_seconds: float = 2.0
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = 50051
    tls_cert: Path | None = None
    """HTTPS; clients of gRPC are not served by TLS."""
    tls_key: Path | None = None
    api_keys: Mapping[str, str] = field(factory=dict, repr=False)
    engine: Mapping[str, Any] = field(factory=dict)
    """Further settings of EngineConfig."""
    certificates: Certificates | None = None

    def __attrs_post_init__(self) -> None:
        if self.most_replicas < self.replicas:
            raise ConfigError(
                f"--max-replicas {self.most_replicas} is less than --replicas {self.replicas}; leave it out "
                "or give more"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key belong together: give both or none")

    def check_nodes(self, nodes: int) -> None:
        """Raises ConfigError where shards would be reached by others unchecked. nodes: machines there are."""
        if self.shards and nodes > 1 and self.certificates is None:
            raise ConfigError(
                f"there are {nodes} nodes, between which shards and engines talk; "
                "give --peer-cert, --peer-key, --peer-ca and --peer-token"
            )

    def check_room(self, total: Mapping[str, float]) -> None:
        """Raises ConfigError where Ray would wait for ever for room.

        total: what all nodes have, as ray.cluster_resources() has it: CPUs, bytes of memory.
        """
        cpus = self.shards * self.shard_cpus + self.replicas * self.cpus
        memory = self.shards * self.shard_ram + self.replicas * self.ram
        has_cpus, has_memory = int(total.get("CPU", 0)), int(total.get("memory", 0))
        if cpus > has_cpus or memory > has_memory:
            raise ConfigError(
                f"{self.shards} shards and {self.replicas} engines need {cpus} CPUs and {memory >> 20} MiB; "
                f"Ray's nodes have {has_cpus} and {has_memory >> 20} MiB. Give fewer, or smaller ones, or "
                "add nodes; ray start --num-cpus and --memory say what a node has"
            )
