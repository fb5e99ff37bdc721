"""TLS and mutual TLS: who has the right certificates is served, nobody else."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
import trustme

from mer.api.grpc.server import serve_grpc
from mer.api.settings import ServerSettings
from mer.errors import ConfigError
from mer.v1 import inference_pb2 as pb
from mer.v1 import inference_pb2_grpc as rpc

CA, STRANGER = trustme.CA(), trustme.CA()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The server's certificate and key, the CA that clients must be of, and what is neither."""
    path = tmp_path_factory.mktemp("tls")
    issued = CA.issue_cert("localhost", "127.0.0.1")
    contents = {
        "cert": b"".join(blob.bytes() for blob in issued.cert_chain_pems),
        "key": issued.private_key_pem.bytes(),
        "other_key": CA.issue_cert("localhost").private_key_pem.bytes(),
        "ca": CA.cert_pem.bytes(),
        "rubbish": b"rubbish",
    }
    for name, data in contents.items():
        (path / name).write_bytes(data)
    return {name: path / name for name in [*contents, "missing"]}


def settings(files: dict[str, Path], cert: str, key: str, ca: str | None = None) -> ServerSettings:
    return ServerSettings(
        model_name="tiny",
        grpc_port=0,
        tls_cert=files[cert],
        tls_key=files[key],
        tls_client_ca=files[ca] if ca else None,
    )


def credentials(root: trustme.CA, client: trustme.CA | None) -> grpc.ChannelCredentials:
    if client is None:
        return grpc.ssl_channel_credentials(root.cert_pem.bytes())
    issued = client.issue_cert("client@example.org")
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    return grpc.ssl_channel_credentials(root.cert_pem.bytes(), issued.private_key_pem.bytes(), chain)


async def status(target: str, given: grpc.ChannelCredentials | None) -> str:
    """The status of a call; there is no model, so who gets through is told that it is being loaded."""
    make = grpc.aio.insecure_channel(target) if given is None else grpc.aio.secure_channel(target, given)
    async with make as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await rpc.InferenceStub(channel).GetModel(pb.GetModelRequest(), timeout=20)
        return "served" if "being loaded" in error.value.details() else error.value.code().name


async def test_tls(files):
    server = await serve_grpc(None, settings(files, "cert", "key"))
    target = f"localhost:{server.port}"
    assert await status(target, credentials(CA, None)) == "served"
    assert await status(target, credentials(STRANGER, None)) == "UNAVAILABLE"
    assert await status(target, None) == "UNAVAILABLE"
    await server.stop(0)


async def test_mutual_tls(files):
    server = await serve_grpc(None, settings(files, "cert", "key", "ca"))
    target = f"localhost:{server.port}"
    assert await status(target, credentials(CA, CA)) == "served"
    assert await status(target, credentials(CA, None)) == "UNAVAILABLE"
    assert await status(target, credentials(CA, STRANGER)) == "UNAVAILABLE"
    await server.stop(0)


@pytest.mark.parametrize(
    ("cert", "key", "ca"),
    [
        ("missing", "key", None),
        ("rubbish", "key", None),
        ("cert", "rubbish", None),
        ("cert", "other_key", None),
        ("cert", "key", "rubbish"),
        ("cert", "key", "missing"),
    ],
)
async def test_files_that_can_not_be_used(files, cert, key, ca):
    with pytest.raises(ConfigError, match=r"--tls-cert .*: can't be used: .+"):
        await serve_grpc(None, settings(files, cert, key, ca))
