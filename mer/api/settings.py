"""What a server is told, for both its faces."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from attrs import field, frozen

from mer.errors import ConfigError

LogFormat = Literal["text", "json"]


@frozen(kw_only=True)
class ServerSettings:
    """Sizes in bytes, times in seconds. Raises ConfigError for settings that contradict each other."""

    model_name: str
    """What clients call the model."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    grpc_port: int | None = 50051
    """None: no gRPC."""
    api_keys: Mapping[str, str] = field(factory=dict, repr=False)
    """Key -> the name that stands in logs. Empty: everybody may ask."""
    rate_limit: int | None = None
    """Requests a minute and key (or address, where there are no keys)."""
    max_concurrent: int | None = None
    """Requests at a time and key (or address)."""
    max_body: int = 16 << 20
    cors_origins: tuple[str, ...] = ()
    """Web pages that may ask; '*': all."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which the server may be called beside its own; '*': any. See mer.api.http.hosts."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """Clients must show a certificate that one of these signed."""
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None
    """Of reload, ram and models over HTTP; 0: any free one. None: there is none."""
    admin_grpc_port: int | None = None
    """The same over gRPC."""
    admin_keys: Mapping[str, str] = field(factory=dict, repr=False)
    """As api_keys, which do not count there. Empty: whoever reaches the port, on this machine alone."""
    drain_timeout: float = 30.0
    """How long requests may go on after SIGTERM."""
    keep_alive: float = 10.0
    """A stream that is silent for so long gets a comment, so that nobody on the way takes it for dead."""
    otel: bool = False
    """Whether requests are traced; where the spans go, variables of OpenTelemetry say."""
    fixed_ram: bool = False
    """Whether caches keep their size also while memory is short on the machine."""
    log_format: LogFormat = "text"
    log_prompts: bool = False

    def __attrs_post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key belong together: give both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
        if not self.admin_keys and not is_loopback(self.admin_host):
            raise ConfigError(
                f"--admin-host {self.admin_host}: others than this machine reach it; give --admin-key-file"
            )


def is_loopback(host: str) -> bool:
    """Whether this name or address always means the machine itself."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(file: Path | None, given: str | None, option: str = "--api-key-file") -> dict[str, str]:
    """Keys and their names, of a file (a line each: KEY or NAME KEY) and of a text with commas.

    Raises ConfigError for a file that can't be read, and for either where it says nothing.
    """
    found: dict[str, str] = {}
    for key in (given or "").split(","):
        if key.strip():
            found[key.strip()] = f"key {len(found) + 1}"
    if given and not found:  # empty is as good as not set; who wrote more wanted keys
        raise ConfigError("MER_API_KEYS: no key is in there; write some, with commas, or leave it unset")
    if file is None:
        return found
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"{option} {file}: can't be read: {why}") from None
    before = len(found)
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or line.lstrip().startswith("#"):
            continue
        if len(words) > 2:
            raise ConfigError(f"{option} {file}, line {number}: write KEY or NAME KEY")
        found[words[-1]] = words[0] if len(words) == 2 else f"key {len(found) + 1}"
    if len(found) == before:
        raise ConfigError(f"{option} {file}: no key is in there; write one a line")
    return found
