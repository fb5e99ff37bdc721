"""Who may talk with whom between machines: addresses, certificates, the join token."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import ssl
from pathlib import Path
from typing import Final

import grpc

from mer.config import parse_address
from mer.errors import ConfigError

_LEAST_TOKEN: Final = 16
METADATA: Final = "authorization"


def is_loopback(address: str) -> bool:
    """Whether only this machine can be reached by it."""
    host = parse_address(address)[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(file: Path | None) -> str:
    """The join token in a file, '' for no file. Raises ConfigError for one that can't be used."""
    if file is None:
        return ""
    try:
        token = file.read_text().strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: the join token can't be read: {error}") from None
    if len(token) < _LEAST_TOKEN or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"{file}: a join token is one line of {_LEAST_TOKEN} characters or more, such as "
            "`openssl rand -hex 32` writes"
        )
    return token


def same_token(given: str, wanted: str) -> bool:
    """How long it takes tells nothing of either."""
    digests = [hashlib.sha256(text.encode()).digest() for text in (given, wanted)]
    return hmac.compare_digest(*digests)


def server_credentials(cert: Path, key: Path, ca: Path) -> grpc.ServerCredentials:
    """Of a server whose clients must have a certificate of `ca`. Raises ConfigError."""
    _check(ssl.Purpose.CLIENT_AUTH, cert, key, ca)
    return grpc.ssl_server_credentials(
        [(key.read_bytes(), cert.read_bytes())], root_certificates=ca.read_bytes(), require_client_auth=True
    )


def channel_credentials(cert: Path, key: Path, ca: Path) -> grpc.ChannelCredentials:
    """Of a client, for servers with a certificate of `ca`. Raises ConfigError."""
    _check(ssl.Purpose.SERVER_AUTH, cert, key, ca)
    return grpc.ssl_channel_credentials(ca.read_bytes(), key.read_bytes(), cert.read_bytes())


def _check(purpose: ssl.Purpose, cert: Path, key: Path, ca: Path) -> None:
    """gRPC says nothing of what it does not like; this names it."""
    try:
        context = ssl.create_default_context(purpose)
        context.load_cert_chain(cert, key, lambda: "")
        context.load_verify_locations(ca)
    except (OSError, ValueError) as error:
        raise ConfigError(f"certificate {cert}, key {key}, CA {ca}: can't be used: {error}") from None
