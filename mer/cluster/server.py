"""The service of a shard: protos/mer/v1/expert.proto over gRPC."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path
from typing import Final

import grpc
from attrs import frozen

from mer._ext.mixture import narrow
from mer.cluster import security
from mer.cluster.guests import Guests
from mer.cluster.identity import Identity
from mer.cluster.shard import MOST_ENGINES, LateError, Shard
from mer.cluster.wire import WIRES, WireError, check_hello, outputs_checksum, unpack
from mer.config import parse_address
from mer.errors import ConfigError
from mer.v1 import expert_pb2 as pb
from mer.v1 import expert_pb2_grpc as rpc

_log = logging.getLogger("mer")

# Who says nothing for so long takes no place: seconds.
_HELLO_S: Final = 10.0


@frozen(kw_only=True)
class ShardSettings:
    """Where a shard listens, and who may come. Raises ConfigError where others would reach it unchecked."""

    listen: str
    token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None

    def __attrs_post_init__(self) -> None:
        parse_address(self.listen)
        tls = (self.tls_cert, self.tls_key, self.tls_client_ca)
        if any(tls) and not all(tls):
            raise ConfigError("--tls-cert, --tls-key and --tls-client-ca: give all three of them")
        if security.is_loopback(self.listen):
            return
        if not all(tls) or self.token_file is None:
            raise ConfigError(
                f"--listen {self.listen} can be reached from other machines: give --tls-cert, --tls-key, "
                "--tls-client-ca and --token-file, or listen on 127.0.0.1"
            )


class ShardServer:
    """Listens on `port` once it is made. Raises ConfigError for an address or files that can't be used."""

    def __init__(self, shard: Shard, settings: ShardSettings) -> None:
        token = security.read_token(settings.token_file)
        self._server = grpc.server(
            ThreadPoolExecutor(MOST_ENGINES, "mer-engine"),
            options=[
                ("grpc.max_receive_message_length", shard.most_bytes),
                ("grpc.max_send_message_length", shard.most_bytes),
                # Who is gone without a word is found out.
                ("grpc.keepalive_time_ms", 10_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=MOST_ENGINES,
        )
        rpc.add_ExpertServicer_to_server(Service(shard, token), self._server)
        cert, key, ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
        try:
            if cert is not None and key is not None and ca is not None:
                credentials = security.server_credentials(cert, key, ca)
                self.port = self._server.add_secure_port(settings.listen, credentials)
            else:
                self.port = self._server.add_insecure_port(settings.listen)
        except RuntimeError:
            raise ConfigError(
                f"--listen {settings.listen}: can't listen there; choose another, or stop who has it"
            ) from None
        self._server.start()

    def stop(self) -> None:
        """Break off all streams: engines read for themselves then."""
        self._server.stop(None).wait()


class Service(rpc.ExpertServicer):
    """Answers engines; one of them decides what is held."""

    def __init__(self, shard: Shard, token: str) -> None:
        self._shard, self._token = shard, token
        self._guests = Guests()

    def Compute(  # noqa: N802 - the name in the proto
        self, request_iterator: Iterator[pb.ComputeRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ComputeResponse]:
        """See the proto."""
        self._check_token(context)
        patience = threading.Timer(_HELLO_S, context.cancel)
        patience.start()
        try:
            first = next(request_iterator, pb.ComputeRequest())
        finally:
            patience.cancel()
        hello = self._check_hello(first, context)
        stream = self._guests.come(hello.engine)
        try:
            _log.info("an engine has come: %s", context.peer())
            welcome = pb.Welcome(capacity=self._shard.capacity, held=self._held(stream))
            yield pb.ComputeResponse(welcome=welcome)
            asked = 0.0  # when the first message of a question was read
            for request in request_iterator:
                kind = request.WhichOneof("kind")
                if kind == "rows":
                    asked = asked if request.rows.part else time.monotonic()
                    yield self._outputs(request.rows, hello.wire, asked, context)
                    continue
                if kind == "assign":
                    if self._guests.decides(stream):
                        self._assign(request.assign, context)
                elif kind != "ping":
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{kind} is not expected here")
                yield pb.ComputeResponse(held=self._held(stream))
        finally:
            self._guests.leave(stream)
            _log.info("an engine has gone: %s", context.peer())

    def _held(self, stream: int) -> pb.Held:
        return pb.Held(experts=self._shard.held(), decides=self._guests.decides(stream))

    def _check_token(self, context: grpc.ServicerContext) -> None:
        metadata = dict(context.invocation_metadata())
        given = str(metadata.get(security.METADATA, "")).removeprefix("Bearer ")
        if self._token and not security.same_token(given, self._token):
            _log.warning("an engine without the join token was sent away: %s", context.peer())
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the join token is wrong or missing")

    def _check_hello(self, request: pb.ComputeRequest, context: grpc.ServicerContext) -> pb.Hello:
        if request.WhichOneof("kind") != "hello":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a stream begins with a Hello")
        hello = request.hello
        try:
            check_hello(hello)
        except WireError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        other = Identity(hello.version, hello.model, hello.arithmetic, hello.probe, hello.protocol)
        refusal = self._shard.identity.refusal(other)
        if refusal is not None:
            _log.warning("an engine was sent away: %s: %s", context.peer(), refusal)
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        return hello

    def _assign(self, assign: pb.Assign, context: grpc.ServicerContext) -> None:
        try:
            if len(assign.experts) > self._shard.total:
                raise ConfigError(f"{len(assign.experts)} experts: there are {self._shard.total}")
            self._shard.assign(assign.experts)
        except ConfigError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    def _outputs(
        self, rows: pb.Rows, wire: str, asked: float, context: grpc.ServicerContext
    ) -> pb.ComputeResponse:
        try:
            x, experts, weights = unpack(rows, self._shard.hidden, self._shard.n_experts, wire)
        except WireError as error:
            context.abort(grpc.StatusCode.DATA_LOSS, str(error))
        found, late = None, False
        try:
            until = asked + rows.patience_ms / 1e3 if rows.patience_ms else inf
            found = self._shard.compute(rows.layer, x, experts, weights, until)
        except LateError:
            late = True
        data = b"" if found is None else narrow(WIRES[wire].id, found)
        outputs = pb.Outputs(id=rows.id, rows=data, checksum=outputs_checksum(rows.id, data), late=late)
        return pb.ComputeResponse(outputs=outputs)
