"""Which prefix store an engine has: opened with it, or later, once another engine has let go of it."""

from __future__ import annotations

from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

from attrs import frozen

from mer.config import EngineConfig
from mer.engine.prefix_store import PrefixStore, slots_within
from mer.engine.runner import Runner
from mer.errors import ConfigError
from mer.gpu.compile import sources
from mer.weights.fingerprint import compiled_code, fingerprint


@frozen
class Storing:
    """Where an engine's prefixes are kept, and whose they are.

    mark: 16 bytes that change with whatever may change a bit of keys and values. What another mark's engine
    has left in the directory is never read: the store begins anew then.
    """

    directory: Path
    size: int
    mark: bytes
    _runner: Runner
    _backend: str

    @classmethod
    def of(cls, runner: Runner, config: EngineConfig) -> Storing | None:
        """None where no store is wanted. Raises ConfigError where there can't be one."""
        if config.prefix_store is None:
            return None
        if runner.spec.recurrent is not None:
            raise ConfigError(
                f"prefix_store: layers of {runner.spec.family} keep a state, without which keys and values "
                "on disk are of no use, and states are kept in memory alone; leave prefix_store out"
            )
        slots_within(config.prefix_store_size, runner.copies.block_bytes)
        # The model (LongRoPE goes by the context), the code, the kernels, how they are kept.
        code = f"{version('mer')} {runner.isa} {runner.kv.dtype}".encode() + compiled_code()
        if config.expert_wire != "f32" and runner.experts is not None:
            code += f"experts in {config.expert_wire}".encode()
        code += repr(runner.spec.rope).encode() + b"".join(sources().values())
        mark = blake2b(fingerprint(runner.checkpoint) + code, digest_size=16).digest()
        return cls(config.prefix_store, config.prefix_store_size, mark, runner, config.io_backend)

    def open(self) -> PrefixStore:
        """Raises ConfigError for a directory that can't be used, or is in use."""
        return PrefixStore(self.directory, self.size, self._runner.copies, self.mark, backend=self._backend)
