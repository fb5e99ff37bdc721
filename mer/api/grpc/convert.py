"""Messages of protos/ to what the engine takes, and back."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, TypeVar

import attrs
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from mer.api.conversation import (
    ChatRequest,
    Event,
    check_variables,
    json_object,
    json_schema,
    template_messages,
)
from mer.api.generation import off_loop
from mer.api.large_json import most_bytes
from mer.engine.observer import Snapshot
from mer.engine.outputs import Delta, Timings, TokenLogprob, Usage
from mer.engine.params import Biases, SamplingParams
from mer.engine.stats import StepStats
from mer.engine.structure import Structure
from mer.engine.view import Percentiles, RequestView, View
from mer.errors import RequestError, RequestTimeoutError
from mer.model.pieces import Reasoning, ToolArguments, ToolCall
from mer.model.tokenizer import Tokenizer
from mer.v1 import inference_pb2 as pb

_M = TypeVar("_M", bound=Message)

_SAMPLING: Final = frozenset(field.name for field in attrs.fields(SamplingParams))
_STEP_FIELDS: Final = [field.name for field in pb.StepStats.DESCRIPTOR.fields]
_PEER_FIELDS: Final = [field.name for field in pb.Peer.DESCRIPTOR.fields]
_STATS_FIELDS: Final = [
    field.name
    for field in pb.GetStatsResponse.DESCRIPTOR.fields
    if field.name not in ("steps", "uptime_s", "vram", "peers")
]
_REASONS: Final = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
}
_SPECULATE: Final[dict[int, str]] = {
    pb.SPECULATE_AUTO: "auto",
    pb.SPECULATE_NGRAM: "ngram",
    pb.SPECULATE_DRAFT: "draft",
    pb.SPECULATE_OFF: "off",
}
_ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_CHOICES: Final[dict[int, Literal["auto", "none", "required"]]] = {
    pb.ToolChoice.MODE_UNSPECIFIED: "auto",
    pb.ToolChoice.MODE_AUTO: "auto",
    pb.ToolChoice.MODE_NONE: "none",
    pb.ToolChoice.MODE_REQUIRED: "required",
}


async def received(kind: type[_M], data: bytes, context: int) -> _M:
    """As `parsed`; a large one on a thread.

    context: tokens that make sense. Raises RequestError for more bytes than these can have.
    """
    if len(data) > (most := most_bytes(context)):
        raise RequestError(
            f"the message has {len(data):,} bytes, more than {most:,}; {context} tokens is the most here"
        )
    return await off_loop(len(data), lambda: parsed(kind, data))


def parsed(kind: type[_M], data: bytes) -> _M:
    """Raises RequestError for what is no such message, or has fields that aren't known here.

    Protocol Buffers would pass over such fields, and the client would not learn why its wish had no effect.
    Messages of a conversation, of which there may be more than anybody reads, `conversation` looks at.
    """
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise RequestError(f"this is no {kind.DESCRIPTOR.full_name}: {error}") from None
    _refuse_unknown(message, "")
    return message


def _refuse_unknown(message: Message, where: str) -> None:
    for unknown in UnknownFieldSet(message):  # type: ignore[attr-defined]
        name = message.DESCRIPTOR.full_name
        raise RequestError(
            f"{name} has no field {unknown.field_number} in this version of the server",
            f"{where}{unknown.field_number}",
        )
    for field, value in message.ListFields():
        kind = field.message_type
        if kind is None or kind is pb.Message.DESCRIPTOR or kind.GetOptions().map_entry:
            continue
        for i, each in enumerate(value) if field.is_repeated else ((None, value),):
            _refuse_unknown(each, f"{where}{field.name}{'' if i is None else f'[{i}]'}.")


def path_of(request: Message) -> Any:
    """Maps what the engine calls a parameter to the path of the field in this request."""
    chat = isinstance(request, pb.ChatRequest) or bool(getattr(request, "messages", None))

    def path(param: str) -> str:
        if param in _SAMPLING:
            return f"params.{param}"
        if param == "prompt":
            return "messages" if chat else request.WhichOneof("prompt") or "prompt"
        return param.replace(".function", "")

    return path


def sampling(given: pb.SamplingParams, remaining: float | None) -> SamplingParams:
    """With a seed in any case, and with the call's deadline (`remaining` seconds) as a limit of time.

    Raises RequestError, and RequestTimeoutError when the deadline has passed.
    """
    fields: dict[str, Any] = {}
    for field, value in given.ListFields():
        if field.name == "structure":
            made = _structure(value)
            fields["structure"] = made.after(value.after) if value.HasField("after") else made
        elif field.name == "speculate":
            fields["speculative"] = _speculate(value)
        elif field.name == "logit_bias":
            fields["logit_bias"] = Biases(value)
        else:
            fields[field.name] = tuple(value) if field.is_repeated else value
    fields.setdefault("seed", secrets.randbits(63))
    params = SamplingParams(**fields)
    if remaining is None or (params.timeout is not None and params.timeout <= remaining):
        return params
    if remaining <= 0:
        raise RequestTimeoutError("the call's deadline has passed")
    return attrs.evolve(params, timeout=remaining)


def _speculate(given: int) -> str:
    if given not in _SPECULATE:
        raise RequestError(f"speculate: there is no value {given}", "params.speculate")
    return _SPECULATE[given]


def _structure(given: pb.Structure) -> Structure:
    match given.WhichOneof("kind"):
        case "json_object" if given.json_object:
            return Structure.json_object()
        case "json_schema":
            return Structure.json_schema(json_schema(given.json_schema, "structure"))
        case "regex":
            return Structure.regex(given.regex)
        case "grammar":
            return Structure.grammar(given.grammar)
        case "choice":
            return Structure.choice(given.choice.texts)
    raise RequestError("structure: say which kind (json_object must be true)", "structure")


def conversation(request: pb.ChatRequest | pb.TokenizeRequest, params: SamplingParams) -> ChatRequest:
    """Raises RequestError."""
    variables = json_object(request.template_variables, "template_variables")
    check_variables(variables, "template_variables")
    made = ChatRequest(
        messages=template_messages([_message(each, i) for i, each in enumerate(request.messages)]),
        params=params,
        tools=[_tool(each, i) for i, each in enumerate(request.tools)] or None,
        variables=variables,
    )
    if isinstance(request, pb.TokenizeRequest):
        return made
    if request.HasField("parallel_tool_calls"):
        made = attrs.evolve(made, several=request.parallel_tool_calls)
    choice = request.tool_choice
    if choice.WhichOneof("choice") == "name":
        if choice.allowed:
            raise RequestError("tool_choice: name or allowed, not both", "tool_choice.allowed")
        return attrs.evolve(made, tool_choice="required", allowed=[choice.name], several=False)
    if choice.mode not in _CHOICES:
        raise RequestError(f"tool_choice.mode {choice.mode} is not known", "tool_choice.mode")
    return attrs.evolve(made, tool_choice=_CHOICES[choice.mode], allowed=list(choice.allowed) or None)


def _message(given: pb.Message, index: int) -> dict[str, Any]:
    _refuse_unknown(given, f"messages[{index}].")
    if given.role not in _ROLES:
        where = f"messages[{index}].role"
        wrong = f"is {given.role[:40]!r}" if given.role else "is missing"
        raise RequestError(f"{where} {wrong}; it must be one of {', '.join(_ROLES)}", where)
    made: dict[str, Any] = {"role": given.role, "content": given.content}
    if given.reasoning:
        made["reasoning_content"] = given.reasoning
    if given.name:
        made["name"] = given.name
    if given.tool_call_id:
        made["tool_call_id"] = given.tool_call_id
    if given.tool_calls:
        made["tool_calls"] = [
            {"id": each.id, "type": "function", "function": {"name": each.name, "arguments": each.arguments}}
            for each in given.tool_calls
        ]
    return made


def _tool(given: pb.Tool, index: int) -> dict[str, Any]:
    where = f"tools[{index}]"
    if not given.name:
        raise RequestError(f"{where}.name is missing", f"{where}.name")
    function: dict[str, Any] = {"name": given.name}
    if given.description:
        function["description"] = given.description
    if given.parameters:
        function["parameters"] = json_object(given.parameters, f"{where}.parameters")
    if given.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def generated(delta: Delta, seed: int, tokenizer: Tokenizer | None) -> pb.GenerateResponse:
    """A piece of an answer."""
    made = pb.GenerateResponse(text=delta.text, token_ids=delta.token_ids)
    if delta.logprobs is not None:
        made.logprobs.extend(logprobs(delta.logprobs, tokenizer))
    if delta.finish_reason is not None:
        made.final.CopyFrom(_final(delta, delta.finish_reason, seed))
    return made


def chatted(event: Event, seed: int, tokenizer: Tokenizer | None) -> pb.ChatResponse:
    """A piece of an answer in a conversation."""
    delta = event.delta
    made = pb.ChatResponse(token_ids=delta.token_ids)
    for piece in event.pieces:
        if isinstance(piece, Reasoning):
            made.reasoning += piece.text
        elif isinstance(piece, ToolCall):
            made.tool_calls.add(index=piece.index, id=piece.id, name=piece.name)
        elif isinstance(piece, ToolArguments):
            made.tool_calls.add(index=piece.index, arguments=piece.text)
        else:
            made.content += piece.text
    if delta.logprobs is not None:
        made.logprobs.extend(logprobs(delta.logprobs, tokenizer))
    if event.finish_reason is not None:
        made.final.CopyFrom(_final(delta, event.finish_reason, seed))
    return made


def _final(delta: Delta, reason: str, seed: int) -> pb.Final:
    return pb.Final(
        finish_reason=_REASONS[reason],
        usage=_usage(delta.usage) if delta.usage else None,
        timings=_timings(delta.timings) if delta.timings else None,
        seed=seed,
    )


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _timings(timings: Timings) -> pb.Timings:
    return pb.Timings(
        queue_s=timings.queue_s,
        prefill_s=timings.prefill_s,
        decode_s=timings.decode_s,
        steps=steps(timings.steps),
        hit_rate=timings.hit_rate,
        drafted=timings.drafted,
        accepted=timings.accepted,
        draft_experts=timings.draft_experts,
    )


def steps(given: StepStats) -> pb.StepStats:
    """The fields that this version of the API has."""
    return pb.StepStats(**{name: getattr(given, name) for name in _STEP_FIELDS})


def stats(snapshot: Snapshot, uptime_s: float) -> pb.GetStatsResponse:
    """The fields that this version of the API has."""
    fields = {name: getattr(snapshot, name) for name in _STATS_FIELDS}
    vram = pb.Vram(**attrs.asdict(snapshot.vram)) if snapshot.vram else None
    peers = [pb.Peer(**{name: getattr(each, name) for name in _PEER_FIELDS}) for each in snapshot.peers]
    return pb.GetStatsResponse(
        **fields, steps=steps(snapshot.steps), uptime_s=uptime_s, vram=vram, peers=peers
    )


def watched(view: View, name: str, uptime_s: float, *, experts: bool) -> pb.WatchResponse:
    """experts: whether the map of them is wanted."""
    now = view.now
    made = pb.WatchResponse(
        time=view.time,
        name=name,
        stats=stats(now, uptime_s),
        requests=[_status(each) for each in view.requests],
        first_token=_percentiles(view.first_token),
        next_token=_percentiles(view.next_token),
        completion_tokens=view.completion_tokens,
        step_count=view.steps,
        step_tokens=view.step_tokens,
        device=pb.Device(reads=view.reads, read_s=now.read_latency.seconds, errors=now.read_errors),
        paused=view.paused,
    )
    if experts and view.experts is not None:
        made.experts.CopyFrom(pb.ExpertMap(**attrs.asdict(view.experts)))
    return made


def _status(given: RequestView) -> pb.RequestStatus:
    state = pb.RequestState.Value(f"REQUEST_STATE_{given.state.upper()}")
    return pb.RequestStatus(**attrs.asdict(given) | {"state": state})


def _percentiles(given: Percentiles) -> pb.Percentiles:
    return pb.Percentiles(**attrs.asdict(given))


def logprobs(
    given: Iterable[TokenLogprob | None], tokenizer: Tokenizer | None, ids: Sequence[int] = ()
) -> list[pb.TokenLogprob]:
    """ids: the tokens' own, where None stands for one that nothing predicts."""

    def raw(token: int) -> bytes:
        return tokenizer.token_bytes(token) if tokenizer else b""

    def one(i: int, each: TokenLogprob | None) -> pb.TokenLogprob:
        if each is None:
            text = tokenizer.token_text(ids[i]) if tokenizer else ""
            return pb.TokenLogprob(token_id=ids[i], text=text, raw=raw(ids[i]))
        return pb.TokenLogprob(
            token_id=each.token_id,
            text=each.text,
            logprob=each.logprob,
            raw=raw(each.token_id),
            top=[
                pb.TopLogprob(token_id=token, text=text, logprob=logprob, raw=raw(token))
                for token, text, logprob in each.top
            ],
        )

    return [one(i, each) for i, each in enumerate(given)]
