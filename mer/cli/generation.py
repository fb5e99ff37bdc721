"""What `run` and `chat` share: their options, and the summary of an answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

import attrs
import click
from rich.console import Console

from mer._ext.cache import POLICIES
from mer._ext.uring import BACKENDS
from mer.cli.common import DEVICE_OPTIONS, size, size_option
from mer.config import EngineConfig, ExpertWire, Speculate
from mer.engine.engine import Engine
from mer.engine.observer import Snapshot
from mer.engine.outputs import Timings, Usage
from mer.engine.params import SamplingParams
from mer.engine.stats import StepStats, Vram
from mer.streaming.profile import ProfileSummary

_F = TypeVar("_F", bound=Callable[..., Any])
_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)

_ENGINE: Final = (
    click.option(
        "--ram", callback=size_option, help="Memory of the whole process (8GiB); default: what is free."
    ),
    *DEVICE_OPTIONS,
    click.option(
        "--context",
        type=int,
        help="Tokens of KV cache, of all requests together; default: 4096 of each request, as memory allows.",
    ),
    click.option(
        "--cache-experts", metavar="N|P%", help="Experts kept in memory; default: what --ram holds."
    ),
    click.option(
        "--cache-policy",
        type=click.Choice(list(POLICIES)),
        default="next-use",
        show_default=True,
        help="Which expert makes room: the one expected to be wanted last, or the one used longest ago.",
    ),
    click.option(
        "--prefetch", type=int, default=8, show_default=True, help="Experts that may be read ahead."
    ),
    click.option(
        "--speculate",
        type=click.Choice(get_args(Speculate)),
        default="auto",
        show_default=True,
        help="Draft tokens, from the text so far (ngram), by a draft model or head (draft) or by either "
        "(auto), and verify several at a time where that is quicker.",
    ),
    click.option(
        "--draft-model", metavar="MODEL", help="A small model with the same tokenizer, kept in memory whole."
    ),
    click.option(
        "--draft-head",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="What mer draft train wrote for this model; default: draft/ in the model's directory.",
    ),
    click.option(
        "--warm-start",
        is_flag=True,
        help="Read back the experts that were in memory at the last end, and remember them at this one.",
    ),
    click.option("--threads", type=int, help="Compute threads; default: the CPUs this process may use."),
    click.option(
        "--kv",
        "kv_dtype",
        type=click.Choice(["auto", "f32", "f16", "q8_0"]),
        default="auto",
        show_default=True,
        help="Precision of keys and values; auto: f16 beside quantised weights, else f32.",
    ),
    click.option(
        "--prefix-store",
        type=click.Path(file_okay=False, path_type=Path),
        help="Directory for keys and values of prompts that memory has no room for; survives a restart.",
    ),
    click.option(
        "--prefix-store-size",
        callback=size_option,
        default="20GiB",
        show_default=True,
        help="Most that it may hold.",
    ),
    click.option(
        "--io",
        "io_backend",
        type=click.Choice(BACKENDS),
        default="auto",
        show_default=True,
        help="How experts are read.",
    ),
    click.option(
        "--queue-depth", type=int, help="Reads that the drive is given at once; default: it is measured."
    ),
    click.option(
        "--peer",
        "peers",
        multiple=True,
        metavar="HOST:PORT",
        help="Another machine that holds experts and computes them (mer shard); may be given several times. "
        "dns:HOST:PORT: all addresses of a name, looked up again and again.",
    ),
    click.option(
        "--expert-wire",
        type=click.Choice(get_args(ExpertWire)),
        default="f32",
        show_default=True,
        help="To what rows are rounded that go into routed experts and come out, here as at peers: bf16 and "
        "f16 halve what goes over the wire.",
    ),
    click.option("--peer-token", type=_FILE, help="A file with the join token of the peers."),
    click.option("--peer-ca", type=_FILE, help="Peers have certificates signed by this one (PEM)."),
    click.option("--peer-cert", type=_FILE, help="Certificate chain of this engine, for them (PEM)."),
    click.option("--peer-key", type=_FILE, help="Its private key (PEM)."),
)
trace_option: Final = click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Write which experts each token chose, as CSV; nothing is drafted meanwhile.",
)
_SAMPLING: Final = (
    click.option("-n", "--max-tokens", type=int, help="Most tokens of an answer; default: a full context."),
    click.option(
        "--temperature", type=float, default=1.0, show_default=True, help="0: the likeliest token each time."
    ),
    click.option("--top-k", type=int, default=0, help="Draw from the K likeliest tokens; 0: all."),
    click.option("--top-p", type=float, default=1.0, help="Draw from the likeliest that make up P; 1: all."),
    click.option(
        "--min-p", type=float, default=0.0, help="Drop tokens below P times the likeliest; 0: none."
    ),
    click.option("--repetition-penalty", type=float, default=1.0, help="As in transformers; 1: none."),
    click.option("--presence-penalty", type=float, default=0.0, help="As in OpenAI's API."),
    click.option("--frequency-penalty", type=float, default=0.0, help="As in OpenAI's API."),
    click.option("--seed", type=int, help="Makes the draws repeatable."),
    click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times."),
    click.option("--stop-token-id", "stop_token_ids", type=int, multiple=True, help="Token that ends it."),
    click.option("--ignore-eos", is_flag=True, help="Go on behind the model's end token."),
)


def engine_options(command: _F) -> _F:
    """The options that EngineConfig takes."""
    for option in reversed(_ENGINE):
        command = option(command)
    return command


def sampling_options(command: _F) -> _F:
    """The options that SamplingParams takes."""
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


def split(options: dict[str, Any]) -> tuple[EngineConfig, SamplingParams]:
    """Options of both kinds -> what they mean. Raises ConfigError or RequestError, naming the option."""
    known = {field.name for field in attrs.fields(EngineConfig)}
    engine = {name: value for name, value in options.items() if name in known}
    sampling = {name: value for name, value in options.items() if name not in known}
    # One answer at a time: where each takes memory of its own, the rest is for experts.
    return EngineConfig(**engine, max_running=1), SamplingParams(**sampling)


def show(text: str) -> None:
    """Print a piece of text now; characters that the output's encoding has not become question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(text.encode(encoding, "replace").decode(encoding), nl=False)
    sys.stdout.flush()


def peak_bytes() -> int:
    """The most memory that this process ever held (VmHWM: unlike getrusage, nothing of its parent)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def describe(engine: Engine, usage: Usage, timings: Timings) -> dict[str, Any]:
    """Usage and timings as `--json` prints them. Seconds and bytes."""
    steps = timings.steps
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "total_tokens": usage.total_tokens,
        },
        "timings": {
            "queue_s": timings.queue_s,
            "prefill_s": timings.prefill_s,
            "decode_s": timings.decode_s,
            **attrs.asdict(steps),
            "hit_rate": timings.hit_rate,
            "prefill_tokens_per_s": _rate(usage.prompt_tokens, timings.prefill_s),
            "decode_tokens_per_s": _rate(usage.completion_tokens - 1, timings.decode_s),
            "drafted": timings.drafted,
            "accepted": timings.accepted,
            "draft_experts": timings.draft_experts,
        },
        "engine": {**engine.facts(), "ram": engine.budget.ram, "peak_bytes": peak_bytes()},
        **_profile(engine.profile),
    }


def _profile(summary: ProfileSummary | None) -> dict[str, Any]:
    if summary is None:
        return {}
    return {"profile": {**attrs.asdict(summary), "python_share": summary.python_share}}


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None


def _speed(count: int, rate: float | None) -> str:
    tokens = "1 token" if count == 1 else f"{count} tokens"
    return tokens if rate is None else f"{rate:.1f} tokens/s ({tokens})"


def print_summary(console: Console, engine: Engine, usage: Usage, timings: Timings) -> None:
    """Speed, where the time went, the cache, reads and memory."""
    steps, budget = timings.steps, engine.budget
    total = timings.prefill_s + timings.decode_s
    experts = steps.expert_s + steps.gpu_wait_s
    rest = max(steps.step_s - experts - steps.io_wait_s, 0.0)
    tokens = usage.prompt_tokens + usage.completion_tokens - 1

    def share(seconds: float) -> str:
        return f"{seconds:.2f} s ({seconds / total:.0%})" if total else "0 s"

    speed = _rate(usage.completion_tokens - 1, timings.decode_s)
    prefill = _rate(usage.prompt_tokens, timings.prefill_s)
    facts = engine.facts()
    spoken = f"{_speed(usage.completion_tokens, speed)}, prompt {_speed(usage.prompt_tokens, prefill)}"
    text = f"sampling and text {share(max(total - steps.step_s, 0.0))}"
    memory = f"peak {size(peak_bytes())}, allowed {size(budget.ram)}"
    if budget.experts:
        lines = {
            "speed": spoken,
            "time": f"experts {share(experts)}, attention and dense {share(rest)}, waiting for reads "
            f"{share(steps.io_wait_s)}, {text}",
            "experts": f"hit rate {timings.hit_rate:.1%}, {size(steps.bytes_read)} read "
            f"({size(steps.bytes_read / tokens)} per token), "
            f"cache of {budget.slots} of {budget.experts} experts" + _read_ahead(steps, facts),
            "memory": memory,
            "uses": f"{facts['io_backend']} reads, at most {facts['queue_depth']} at once, "
            f"{facts['isa']} kernels, {facts['threads']} threads",
        }
    else:
        lines = {
            "speed": spoken,
            "time": f"model {share(rest)}, {text}",
            "memory": f"{memory}; all {size(budget.dense)} of weights are in it, the model is dense",
            "uses": f"{facts['isa']} kernels, {facts['threads']} threads",
        }
    now = engine.snapshot()
    if (vram := now.vram) is not None:
        lines["gpu"] = _gpu(vram, steps)
    if now.peers:
        lines["peers"] = _peers(now)
    if timings.drafted:
        lines["drafts"] = f"{timings.accepted} of {timings.drafted} drafted tokens were right"
        if budget.experts:
            lines["drafts"] += f", {timings.draft_experts / timings.drafted:.1f} further experts for each"
    if engine.profile is not None:
        lines["profile"] = _decode_steps(engine.profile)
    if facts["advice"]:
        lines["advice"] = facts["advice"]
    for name, text in lines.items():
        console.print(f"  {name:8} {text}", style="dim", soft_wrap=True)


def _read_ahead(steps: StepStats, facts: Mapping[str, Any]) -> str:
    if not steps.prefetched:
        return ""
    vain = max(steps.prefetch_bytes - steps.prefetch_used_bytes, 0)
    return (
        f", {steps.prefetched} read ahead ({steps.prefetch_used / steps.prefetched:.0%} used, "
        f"{size(vain)} in vain; {steps.guesses_right / max(steps.guesses, 1):.0%} of guesses right, "
        f"now {facts['prefetch_depth']} deep)"
    )


def _gpu(vram: Vram, steps: StepStats) -> str:
    if vram.lost is not None:
        return f"{vram.device} was given up ({vram.lost})" + (
            "" if vram.layers else "; all went on without it"
        )
    dense = f"{vram.device}, dense part of {vram.layers} layers {size(vram.dense_bytes)}, their keys and "
    dense += f"values {size(vram.kv_bytes)}"
    if not vram.slots:
        return dense
    return (
        f"{dense if vram.layers else vram.device}, {size(vram.nbytes)} with {vram.resident} of {vram.slots} "
        f"experts; it computed {steps.on_gpu:.1%} of experts, {size(steps.bus_bytes)} went over the bus for "
        f"{steps.vram_promotions + steps.vram_passed}, waiting for it took {steps.gpu_wait_s:.2f} s"
    )


def tell_gpu(console: Console, engine: Engine) -> None:
    """At the start: what is on the GPU, if there is one."""
    if (vram := engine.snapshot().vram) is not None:
        console.print(f"  {'gpu':8} {vram.told(engine.budget.experts)}", style="dim", soft_wrap=True)


def _peers(now: Snapshot) -> str:
    there = sum(peer.condition == "up" for peer in now.peers)
    held = sum(peer.held for peer in now.peers)
    text = (
        f"{there} of {len(now.peers)} there, with {held} experts; they computed {now.peer_hits}, "
        f"{size(sum(peer.sent for peer in now.peers))} went there and "
        f"{size(sum(peer.received for peer in now.peers))} came back, waiting took {now.peer_wait_s:.2f} s"
    )
    lost = [f"{peer.address}: {peer.error}" for peer in now.peers if peer.error]
    return "; ".join([text, *lost])


def _decode_steps(profile: ProfileSummary) -> str:
    if not profile.decode_steps:
        return "no decode steps"
    return (
        f"{profile.decode_steps} decode steps of {1e3 * profile.step_s / profile.decode_steps:.2f} ms, "
        f"Python between kernels {profile.python_share:.1%}"
    )
