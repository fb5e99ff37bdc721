"""An engine as a replica of Ray Serve: both faces of `mer serve`, asked by way of Ray."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, Final

import grpc
import ray
from attrs import evolve
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from ray import serve
from ray.util.metrics import Gauge

from mer.api.admin import watch_files
from mer.api.breathing import breathe
from mer.api.grpc.server import GrpcServer, serve_grpc
from mer.api.http.app import create_app
from mer.api.http.errors import ApiError
from mer.api.http.server import HttpServer, Place
from mer.api.http.service import Service
from mer.api.model import Model
from mer.api.models import Models, start
from mer.api.settings import ServerSettings
from mer.config import EngineConfig
from mer.deploy.plan import NAME, Plan
from mer.deploy.waiting import QueueTimes
from mer.engine.engine import Engine
from mer.errors import EngineFailedError
from mer.streaming import pressure
from mer.weights.hub import locate

# Seconds between two looks at where the shards are.
_LOOK: Final = 2.0
# Seconds that a call of an actor may take which only tells what it knows.
_SOON: Final = 10.0

# What Ray's dashboard is told, as ray_mer_NAME, of what `state` says.
_GAUGES: Final = {
    "running": "Requests that an engine computes",
    "waiting": "Requests that wait for an engine",
    "queue_seconds": "Seconds that a request waited for its first step, the longest of the last 30 s",
    "peers": "Shards that an engine uses",
}

_SERVICE: Final = "/mer.v1.Inference/"


def shard_names(plan: Plan) -> list[str]:
    """Of the actors."""
    return [f"{NAME}-shard-{number}" for number in range(plan.shards)]


async def addresses(plan: Plan) -> list[str]:
    """Of the shards that are there."""
    found: list[str] = []
    for name in shard_names(plan):
        with suppress(ValueError, ray.exceptions.RayError, TimeoutError):
            actor = ray.get_actor(name, namespace=NAME)
            found.append(await asyncio.wait_for(actor.address.remote(), _SOON))
    return found


class EngineReplica:
    """Ray Serve makes it, asks `check_health`, and ends it."""

    async def __init__(self, plan: Plan) -> None:  # type: ignore[misc]
        """Opens the model. Raises what Engine.open raises."""
        self._plan = plan
        files = plan.certificates
        peers: dict[str, Any] = {}
        self._addresses: list[str] = []
        if plan.shards:
            peers["peers"] = self._addresses = await _some(plan)
            if files is not None:
                peers |= {"peer_cert": files.cert, "peer_key": files.key, "peer_ca": files.ca}
                peers["peer_token"] = files.token
        config = EngineConfig(**{"ram": plan.ram, "threads": plan.cpus, **plan.engine, **peers})
        settings = ServerSettings(
            model_name=plan.model_name, host=plan.host, port=plan.port, api_keys=plan.api_keys
        )
        self._most = config.max_running
        self._models = Models([Model(plan.model_name, locate(plan.model), config)])
        self._times = QueueTimes(time.monotonic)
        self._models.changed.append(self._follow)
        self._service = Service(settings, models=self._models)
        self._app = create_app(self._service)
        engine = await self._models.open_first()
        self._stack = AsyncExitStack()
        # For mer top, and for who gathers metrics of each engine.
        own = HttpServer(self._app, settings, Place("127.0.0.1", 0))
        self._http = await self._stack.enter_async_context(own)
        self._grpc: GrpcServer = await serve_grpc(
            None, evolve(settings, host="127.0.0.1", grpc_port=0), self._service.access, self._models
        )
        self._stack.push_async_callback(self._grpc.stop, 0)
        await self._grpc.ready(engine)
        self._channel = grpc.aio.insecure_channel(
            f"127.0.0.1:{self._grpc.port}",
            [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
        )
        self._stack.push_async_callback(self._channel.close)
        self._answering: set[asyncio.Task[None]] = set()
        self._tasks = [
            start(watch_files(self._models), "watching files"),
            start(breathe(self._models, pressure.Gauge()), "watching memory"),
            start(self._look(), "watching shards"),
        ]

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._stack.aclose()
        await self._models.close(drain=False)

    @property
    def _engine(self) -> Engine:
        return self._service.engine

    def _follow(self, _model: Model, engine: Engine | None) -> None:
        if engine is not None:
            engine.observe(self._times)
            self._addresses = []  # one that was loaded anew has those of the start: told by the next look

    async def _look(self) -> None:
        """Tell Ray's dashboard how it is; where shards are: Ray may have started one at another address."""
        gauges = {name: Gauge(f"mer_{name}", text) for name, text in _GAUGES.items()}
        while True:
            with suppress(ApiError):  # the model is being loaded anew
                state = self.state()
                for name, gauge in gauges.items():
                    gauge.set(state[name])
            await asyncio.sleep(_LOOK)
            found = await addresses(self._plan)
            if found and found != self._addresses:
                with suppress(ApiError):
                    self._engine.exchange_peers(found)
                    self._addresses = found

    # ---- what Ray asks ----

    def check_health(self) -> None:
        """Ray ends a replica for which this raises, and starts another."""
        failed = self._models.failure
        if failed:
            raise EngineFailedError(failed)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """See mer.deploy.ray_scaling."""
        now = self._engine.snapshot()
        return {"queue_seconds": self._times.worst(now.waiting), "running": now.running}

    # ---- what mer asks ----

    def state(self) -> dict[str, Any]:
        """What `mer cluster status` shows."""
        now = self._engine.snapshot()
        return {
            "replica": serve.get_replica_context().replica_id.unique_id,
            "node": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
            # Both on the node's loopback address: of the gRPC API, for mer top, and of the HTTP API.
            "address": f"127.0.0.1:{self._grpc.port}",
            "url": self._http.url,
            "running": now.running,
            "waiting": now.waiting,
            "queue_seconds": self._times.worst(now.waiting),
            "peers": sum(peer.condition == "up" for peer in now.peers),
            "peer_hits": now.peer_hits,
            "prefix_hit_tokens": now.prefix_hit_tokens,
            "prefix_query_tokens": now.prefix_query_tokens,
        }

    async def http(
        self, scope: dict[str, Any], body: bytes, keys: Sequence[bytes] = ()
    ) -> AsyncGenerator[list[dict[str, Any]], None]:
        """What the HTTP API answers: ASGI's messages, as many at a time as there are."""
        inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})
        outbox: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        async def answer() -> None:
            try:
                await self._app(scope, inbox.get, outbox.put)  # type: ignore[arg-type]
            finally:
                outbox.put_nowait(None)

        task = asyncio.create_task(answer())
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        try:
            more = True
            while more:
                messages: list[dict[str, Any]] = []
                message = await outbox.get()
                while message is not None:
                    messages.append(message)
                    if outbox.empty():
                        break
                    message = outbox.get_nowait()
                more = message is not None
                if messages:
                    yield messages
            await task
        finally:
            # By this the application ends what it has begun; cancelled, it would leave that running.
            inbox.put_nowait({"type": "http.disconnect"})

    async def rpc(
        self,
        method: str,
        request: bytes,
        metadata: Sequence[tuple[str, str | bytes]],
        keys: Sequence[bytes] = (),
    ) -> AsyncGenerator[tuple[bytes, Mapping[str, str] | None], None]:
        """What the gRPC API answers: messages as they are, and in the last pair the status of an error."""
        path, passed = _SERVICE + method, tuple(metadata)
        call: Any
        if method == "Session":  # of one request
            talk: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(path)
            call = talk(iter([request]), metadata=passed)
        else:
            ask: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(path)
            call = ask(request, metadata=passed)
        try:
            async for response in call:
                yield response, None
        except grpc.aio.AioRpcError as error:
            # Ray drops what else an error brings (google.rpc's details).
            yield (
                b"",
                {
                    "code": error.code().name,
                    "details": error.details() or "",
                    "reason": _reason(dict(error.trailing_metadata() or ())),
                },
            )
        finally:
            call.cancel()


def _reason(metadata: Mapping[str, str | bytes]) -> str:
    """That of google.rpc.ErrorInfo; '' if there is none."""
    packed = metadata.get("grpc-status-details-bin", b"")
    info = ErrorInfo()
    for detail in Status.FromString(packed).details if isinstance(packed, bytes) else ():
        if detail.Unpack(info):
            return info.reason
    return ""


async def _some(plan: Plan) -> list[str]:
    """At least one: an engine that knows no shard at its start has no use for one later."""
    while True:
        found = await addresses(plan)
        if found:
            return found
        await asyncio.sleep(_LOOK)
