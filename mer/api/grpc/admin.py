"""mer.v1.Admin, on a port of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import attrs
import grpc
from google.protobuf.message import Message
from grpc_reflection.v1alpha import reflection

from mer.api.access import Access
from mer.api.admin import Admin
from mer.api.grpc import convert
from mer.api.grpc.gate import Context, Gate
from mer.api.grpc.operating import Operating
from mer.api.grpc.server import bind
from mer.api.model import LoadingError, ModelState
from mer.api.settings import ServerSettings
from mer.engine.budget import resident_bytes
from mer.engine.engine import Engine
from mer.v1 import admin_pb2 as pb

_Q = TypeVar("_Q", bound=Message)

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Admin"].full_name


class AdminService:
    """What the calls do."""

    def __init__(self, admin: Admin, gate: Gate) -> None:
        self._admin = admin
        self._gate = gate

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """By the name of the call."""
        return {
            "Reload": self._unary("Reload", pb.ReloadRequest, self.reload),
            "SetRam": self._unary("SetRam", pb.SetRamRequest, self.set_ram),
            "ListModels": self._unary("ListModels", pb.ListModelsRequest, self.list_models),
            **Operating(self._engine, self._gate).handlers(),
        }

    def _unary(
        self, name: str, kind: type[_Q], method: Callable[[_Q], Awaitable[Message]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def handle(data: bytes, context: Context) -> bytes:
            async with self._gate.call(context, name):
                # Whoever asked may go: what has begun is finished.
                work = asyncio.ensure_future(method(convert.parsed(kind, data)))
                return (await asyncio.shield(work)).SerializeToString()

        return grpc.unary_unary_rpc_method_handler(handle)

    async def reload(self, request: pb.ReloadRequest) -> pb.ReloadResponse:
        """Raises as Admin.reload does."""
        state, seconds = await self._admin.reload(
            request.model, request.path, dict(request.settings), whole=request.verify_all
        )
        return pb.ReloadResponse(model=_state(state), seconds=seconds)

    async def set_ram(self, request: pb.SetRamRequest) -> pb.SetRamResponse:
        """Raises ConfigError, BudgetError."""
        await self._admin.set_ram(request.ram)
        return pb.SetRamResponse(models=self._states(), **self._memory())

    async def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """All of them."""
        return pb.ListModelsResponse(models=self._states(), **self._memory())

    def _engine(self, name: str) -> Engine:
        """Raises UnknownModelError, LoadingError."""
        model = self._admin.models.find(name)
        if model.engine is None:
            raise LoadingError(f"the model {model.name!r} is not loaded")
        return model.engine

    def _memory(self) -> dict[str, int]:
        models = self._admin.models
        return {
            "ram_bytes": models.ram,
            "asked_ram_bytes": models.asked,
            "resident_bytes": resident_bytes(),
        }

    def _states(self) -> list[pb.ModelState]:
        return [_state(each) for each in self._admin.models.states()]


def _state(state: ModelState) -> pb.ModelState:
    return pb.ModelState(**attrs.asdict(state))


async def serve_admin(admin: Admin, settings: ServerSettings) -> tuple[grpc.aio.Server, int]:
    """A server on settings.admin_host and admin_grpc_port, and its port. Raises ConfigError."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    service = AdminService(admin, Gate(Access(settings.admin_keys)))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, service.handlers()),))
    reflection.enable_server_reflection((SERVICE, reflection.SERVICE_NAME), server)
    told = attrs.evolve(settings, host=settings.admin_host, grpc_port=settings.admin_grpc_port)
    port = bind(server, told, "--admin-host", "--admin-grpc-port")
    await server.start()
    return server, port
