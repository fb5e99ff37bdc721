"""Settings of an engine, checked where they are made."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final, Literal, get_args

from attrs import Attribute, converters, field, frozen

from mer.errors import ConfigError

# What a C int holds.
_MOST: Final = (1 << 31) - 1
_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

Speculate = Literal["auto", "ngram", "draft", "off"]
ExpertWire = Literal["f32", "bf16", "f16"]
KVChoice = Literal["auto", "f32", "f16", "q8_0"]


def parse_size(text: str | int) -> int:
    """Bytes of '8GiB', '512 MiB', '1.5G' or '4096': units are powers of 1024. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", str(text), re.IGNORECASE)
    size = 0.0 if match is None else float(match[1]) * _UNITS[match[2].upper()]
    if not 1 <= size < 1 << 63:
        raise ConfigError(f"{text!r} is not a size; write 8GiB, 512MiB or a number of bytes")
    return int(size)


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) of 'node1:9100' or '[::1]:9100'. Raises ConfigError."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^\s:/\[\]]+)):(\d{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise ConfigError(f"{text!r} is not an address; write HOST:PORT, such as node1:9100 or [::1]:9100")
    return match[1] or match[2], int(match[3])


def peer_name(peer: str) -> str | None:
    """HOST:PORT of 'dns:HOST:PORT', a name all of whose addresses are peers; None for the address of one."""
    name = peer.removeprefix("dns:")
    return name if name != peer and ":" in name else None


def cache_dir() -> Path:
    """Where programs keep what they can make again (XDG). Raises OSError where the user has no home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named) / "mer"
    try:
        return Path.home() / ".cache" / "mer"
    except RuntimeError:
        raise OSError("there is no home directory; set XDG_CACHE_HOME") from None


def _share(given: Any) -> int | float | None:
    """A number of experts, or a share of all such as '25%' or 0.25; refused as it was written."""
    if given is None:
        return None
    value: int | float = given
    if isinstance(given, bool) or not isinstance(given, int | float):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", str(given))
        if match is None or (not match[2] and "." in match[1]):
            raise ConfigError(f"cache_experts {given!r}: write a number of experts or a share such as 25%")
        value = float(match[1]) / 100 if match[2] else int(match[1])
    if not (value > 0 and (isinstance(value, int) or value <= 1)):
        raise ConfigError(f"cache_experts {given}: must be above 0, and a share at most 100%")
    return value


def _at_least(least: int) -> Any:
    def check(_: Any, attribute: Attribute[Any], value: int | None) -> None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigError(f"{attribute.name} {value!r}: must be a whole number of at least {least}")
        if value is not None and value > _MOST:
            raise ConfigError(f"{attribute.name} {value!r}: must be at most {_MOST}")

    return check


def _addresses(given: Any) -> tuple[str, ...]:
    addresses = (given,) if isinstance(given, str) else tuple(given)
    for address in addresses:
        parse_address(peer_name(address) or address)
        if addresses.count(address) > 1:
            raise ConfigError(f"peers: {address} is named twice")
    return addresses


def _one_of(*known: str) -> Any:
    def check(_: Any, attribute: Attribute[Any], value: str) -> None:
        if value not in known:
            raise ConfigError(f"{attribute.name} {value!r} is unknown; choose one of {', '.join(known)}")

    return check


def _flag(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if type(value) is not bool:
        raise ConfigError(f"{attribute.name} {value!r}: must be true or false")


def _size(value: str | int | None) -> int | None:
    return None if value is None else parse_size(value)


def _vram(value: str | int | None) -> int | None:
    if value is not None and re.fullmatch(r"\s*0+(\.0+)?\s*([kmgt]?i?b?)\s*", str(value), re.IGNORECASE):
        raise ConfigError(f"vram {value}: for no GPU at all, set device to cpu and leave vram out")
    return _size(value)


def _layers(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def _auto_or_at_least_0(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ConfigError(f"{attribute.name} {value!r}: must be auto, or a number of layers of at least 0")


def _device(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if not isinstance(value, str) or re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", value) is None:
        raise ConfigError(
            f"{attribute.name} {value!r} is unknown; choose auto, cpu, cuda, or cuda:N, the N-th GPU from 0"
        )


@frozen(kw_only=True)
class EngineConfig:
    """How an engine uses the machine. What a model answers changes with `kv_dtype` and `expert_wire` alone.

    Raises ConfigError for a value that can't be, naming the setting.
    """

    #: Bytes that the whole process may hold (or '8GiB'); None: what is free, less a margin.
    ram: int | None = field(default=None, converter=_size)
    #: What computes beside the CPU. auto: a GPU where there is all that it needs. cuda, cuda:1: that GPU, or
    #: an error that says what is missing.
    device: str = field(default="auto", validator=_device)
    #: Bytes of the GPU's memory that may be used (or '6GiB'); None: what is free there, less a margin.
    vram: int | None = field(default=None, converter=_vram)
    #: Of how many layers, from the first on, the GPU computes all but the routed experts; the head counts as
    #: one behind the last. auto: as many as `vram` has room for beside some experts.
    gpu_layers: int | Literal["auto"] = field(
        default="auto", converter=_layers, validator=_auto_or_at_least_0
    )
    #: Tokens that the KV cache holds, of all requests together, and so the most of one request if the model
    #: takes that many. None: 4096 of a request, or the model's context if that is shorter; of `max_running`
    #: such requests as many as half of the memory holds that is left with all experts there, but at least
    #: 4096, or one context where more would take memory from experts. With a GPU, and where several models
    #: share the memory, not more than that.
    context: int | None = field(default=None, validator=_at_least(16))
    #: Compute threads; None: the CPUs that affinity and control groups leave.
    threads: int | None = field(default=None, validator=_at_least(1))
    #: Most tokens of one step: the size of a prompt's chunks.
    step_tokens: int = field(default=512, validator=_at_least(1))
    #: Most requests that are computed at the same time; further ones wait.
    max_running: int = field(default=16, validator=_at_least(1))
    #: Most requests that wait for their first step; further ones are refused with QueueFullError.
    max_waiting: int = field(default=256, validator=_at_least(1))
    #: Whether keys and values of a prompt's beginning are taken from requests that began the same way.
    prefix_cache: bool = field(default=True, validator=_flag)
    #: A directory for those that memory has no room for; they survive a restart. None: there is none.
    prefix_store: Path | None = field(default=None, converter=converters.optional(Path))
    #: Most bytes that the directory holds (or '20GiB').
    prefix_store_size: int = field(default=20 << 30, converter=parse_size)
    #: Keys and values. auto: f16 beside quantised weights, f32 beside others, so that nothing is rounded.
    kv_dtype: KVChoice = field(default="auto", validator=_one_of("auto", "f32", "f16", "q8_0"))
    #: Slots of the expert cache: a number, or a share of all experts (0.25, '25%'). None: what `ram` leaves.
    cache_experts: int | float | None = field(default=None, converter=_share)
    #: Which expert makes room: 'next-use', the one expected to be wanted last, or 'lru'.
    cache_policy: str = "next-use"
    #: 'auto', 'uring', 'preadv' or 'buffered'.
    io_backend: str = "auto"
    #: Reads that the device sees at once. None: measured on the files of a model that streams its experts.
    queue_depth: int | None = field(default=None, validator=_at_least(1))
    #: Experts that may be on their way before their layer asks for them; 0: none.
    prefetch: int = field(default=8, validator=_at_least(0))
    #: How next tokens are drafted, to be verified several at a time where that has been quicker. 'ngram':
    #: from what stood in the text before. 'draft': by a draft model or head. 'auto': by either. 'off':
    #: they come one by one. The answers are the same.
    speculate: Speculate = field(default="auto", validator=_one_of(*get_args(Speculate)))
    #: A small model with the same tokenizer, all of it in memory, that drafts: a path or a hub's name.
    draft_model: str | None = field(default=None, converter=converters.optional(str))
    #: A draft head that `mer draft train` wrote for this model; None: the one in the model's own directory
    #: (draft/), if there is one.
    draft_head: Path | None = field(default=None, converter=converters.optional(Path))
    #: Whether the experts that are in memory at the end are read back at the next start, in the background.
    warm_start: bool = False
    #: Other machines that hold experts in memory and compute them (`mer shard`): their addresses, HOST:PORT;
    #: dns:HOST:PORT are all addresses of a name, which is looked up again and again.
    peers: tuple[str, ...] = field(default=(), converter=_addresses)
    #: To what each row is rounded that goes into a routed expert, or comes out weighted, wherever that is:
    #: peers are sent, and send, half with 'bf16' and 'f16'. In 'f16' what is beyond 65504 is infinite.
    expert_wire: ExpertWire = field(default="f32", validator=_one_of(*get_args(ExpertWire)))
    #: A file with the token by which they let an engine in.
    peer_token: Path | None = field(default=None, converter=converters.optional(Path))
    #: Certificates for them (PEM), needed for all that are not this machine: their CA's, the engine's own,
    #: and its key.
    peer_ca: Path | None = field(default=None, converter=converters.optional(Path))
    peer_cert: Path | None = field(default=None, converter=converters.optional(Path))
    peer_key: Path | None = field(default=None, converter=converters.optional(Path))
    #: A file for the routing of every step, as bench/policy.py replays it; None: none is written.
    trace: Path | None = field(default=None, converter=converters.optional(Path))
    #: A file for a Chrome trace of where the time of every step went; None: none is written.
    profile: Path | None = field(default=None, converter=converters.optional(Path))

    def __attrs_post_init__(self) -> None:
        if self.vram is not None and self.device == "cpu":
            raise ConfigError(
                "vram is a GPU's memory, which device cpu leaves alone; leave one of the two out"
            )
        if self.gpu_layers != "auto" and self.gpu_layers > 0 and self.device == "cpu":
            raise ConfigError("gpu_layers are for a GPU, which device cpu leaves alone; leave one out")
        if self.prefix_store is not None and not self.prefix_cache:
            raise ConfigError(
                "prefix_store keeps what the prefix cache has no room for; leave prefix_cache on"
            )
        certificates = ("peer_ca", "peer_cert", "peer_key")
        given = [name for name in certificates if getattr(self, name) is not None]
        if not self.peers and (given or self.peer_token is not None):
            raise ConfigError(
                f"{(*given, 'peer_token')[0]} is for peers, and there are none: name them in peers"
            )
        if given and len(given) < len(certificates):
            raise ConfigError(f"{', '.join(given)} alone will not do: give {', '.join(certificates)}")
        for name in ("draft_model", "draft_head"):
            if getattr(self, name) is not None and self.speculate in ("ngram", "off"):
                raise ConfigError(
                    f"speculate {self.speculate}: {name} is of no use then; leave one of the two out"
                )
