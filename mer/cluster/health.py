"""Whether a shard is well, told by gRPC's health protocol, for who looks after it (Kubernetes' probes)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from mer.config import parse_address
from mer.errors import ConfigError

# Of a message, in bytes: the name of a service.
_LARGEST: Final = 4096


class HealthServer:
    """Listens on `port` once it is made, and says NOT_SERVING until it is told another.

    A port of its own, without certificates or token: probes have neither, and nothing else can be asked here.
    Raises ConfigError for an address that can't be used.
    """

    def __init__(self, listen: str) -> None:
        """listen: HOST:PORT; port 0: a free one."""
        parse_address(listen)
        self._servicer = health.HealthServicer()
        self.tell(False)
        self._server = grpc.server(
            ThreadPoolExecutor(2, "mer-health"),
            options=[("grpc.max_receive_message_length", _LARGEST), ("grpc.so_reuseport", 0)],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        try:
            self.port = self._server.add_insecure_port(listen)
        except RuntimeError:
            raise ConfigError(
                f"--health {listen}: can't listen there; choose another, or stop who has it"
            ) from None
        self._server.start()

    def tell(self, serving: bool) -> None:
        """What is answered from now on."""
        status = health_pb2.HealthCheckResponse
        self._servicer.set("", status.SERVING if serving else status.NOT_SERVING)

    def stop(self) -> None:
        """Answer nobody any more."""
        self._server.stop(None).wait()
