"""POST /tokenize and /detokenize."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType
from quart import Blueprint, Response

from mer.api.conversation import check_variables, template_messages, template_tokens
from mer.api.generation import off_loop, told_tokens
from mer.api.http.answers import DetokenizedText, Tokens
from mer.api.http.errors import api_error, invalid
from mer.api.http.schemas import DetokenizeRequest, TokenizeRequest
from mer.api.http.service import Service, body_as, json_response, translated
from mer.errors import RequestError


def blueprint(service: Service) -> Blueprint:
    """The endpoints."""
    made = Blueprint("texts", __name__)

    @made.post("/tokenize")
    async def tokenize() -> Response:
        body = await body_as(TokenizeRequest, models=service.loaded)
        _, engine = await service.use(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("give a prompt or messages, and not both", "prompt")
        if body.messages is None:
            tokens = await told_tokens(engine, body.prompt or "", special=body.add_special_tokens)
        else:
            messages = await translated(lambda: template_messages(msgspec.to_builtins(body.messages)))
            tools = await translated(lambda: msgspec.to_builtins(body.tools) if body.tools else None)
            given = body.chat_template_kwargs or {}
            check_variables(given, "chat_template_kwargs")
            variables = {**given, "tools": tools}
            variables["add_generation_prompt"] = body.add_generation_prompt
            tokens = await template_tokens(engine, messages, variables)
        strings: list[str] | UnsetType = UNSET
        if body.return_token_strs and engine.tokenizer is not None:
            text = engine.tokenizer.token_text
            strings = await off_loop(len(tokens), lambda: [text(token) for token in tokens])
        return json_response(Tokens(len(tokens), engine.context, tokens, strings))

    @made.post("/detokenize")
    async def detokenize() -> Response:
        body = await body_as(DetokenizeRequest, ids=("tokens", service.settings.max_body))
        _, engine = await service.use(body.model)
        tokenizer = engine.tokenizer
        if tokenizer is None:
            raise invalid("this model came without a tokenizer", "tokens")
        try:
            text = await off_loop(len(body.tokens), lambda: tokenizer.decode(body.tokens, skip_special=False))
        except RequestError as error:
            raise api_error(error, {"prompt": "tokens"}) from None
        return json_response(DetokenizedText(text))

    return made
