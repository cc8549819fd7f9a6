"""The OpenAPI document of the server, by hand; a test holds it to the routes."""

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_TRUTH: Schema = {"type": "boolean"}
_WHOLE: Schema = {"type": "integer"}
_COUNT: Schema = {"type": "integer", "minimum": 1}
_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    schema: Schema = {"type": "object", "properties": properties}
    schema["additionalProperties"] = False
    return {**schema, "required": list(required)} if required else schema


def _list(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def _number(least: float, most: float | None = None) -> Schema:
    limits = {"minimum": least} if most is None else {"minimum": least, "maximum": most}
    return {"type": "number", **limits}


_STOP: Schema = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        _list({"type": "string", "minLength": 1}, maxItems=16),
    ]
}
_PARTS: Schema = {
    "anyOf": [
        _TEXT,
        _list(
            _object(("type", "text"), type={"const": "text"}, text=_TEXT), minItems=1
        ),
    ]
}
_SAMPLING: dict[str, Schema] = {
    "temperature": _number(0),
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": 0},
    "min_p": _number(0, 1),
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
    "presence_penalty": {"type": "number"},
    "frequency_penalty": {"type": "number"},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number"}},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
}
_OPENAI: dict[str, Schema] = {
    "model": _TEXT,
    **_SAMPLING,
    "n": {"type": "integer", "minimum": 1, "maximum": 128},
    "stop": _STOP,
    "stream": _TRUTH,
    "stream_options": _object(include_usage=_TRUTH, include_obfuscation=_TRUTH),
    "user": _TEXT,
}


def _messages(*roles: str) -> Schema:
    role: Schema = {"enum": list(roles)}
    message = _object(("role", "content"), role=role, content=_PARTS)
    return _list(message, minItems=1)


_CHAT = _messages("system", "developer", "user", "assistant")
_DIALOG: dict[str, Schema] = {
    "model": _TEXT,
    "system": _PARTS,
    "messages": _messages("user", "assistant"),
}

BODIES: dict[str, Schema] = {
    "/v1/completions": _object(
        ("prompt",),
        **_OPENAI,
        prompt={
            "anyOf": [
                {"type": "string", "minLength": 1},
                _list({"type": "string", "minLength": 1}, minItems=1, maxItems=256),
                {**_IDS, "minItems": 1},
                _list({**_IDS, "minItems": 1}, minItems=1, maxItems=256),
            ]
        },
        suffix=_TEXT,
        max_tokens={"type": "integer", "minimum": 0},
        logprobs={"type": "integer", "minimum": 0},
        echo=_TRUTH,
        best_of=_COUNT,
    ),
    "/v1/chat/completions": _object(
        ("messages",),
        **_OPENAI,
        messages=_CHAT,
        max_tokens=_COUNT,
        max_completion_tokens=_COUNT,
        logprobs=_TRUTH,
        top_logprobs={"type": "integer", "minimum": 0},
    ),
    "/v1/messages": _object(
        ("messages", "max_tokens"),
        **_DIALOG,
        **_SAMPLING,
        max_tokens=_COUNT,
        stop_sequences=_STOP,
        stream=_TRUTH,
        metadata=_object(user_id=_TEXT),
    ),
    "/v1/messages/count_tokens": _object(("messages",), **_DIALOG),
    "/infill": _object(
        model=_TEXT,
        input_prefix=_TEXT,
        input_suffix=_TEXT,
        input_extra=_list(_object(filename=_TEXT, text=_TEXT)),
        prompt=_TEXT,
        n_predict={"type": "integer", "minimum": -1},
        temperature=_SAMPLING["temperature"],
        top_p=_SAMPLING["top_p"],
        top_k=_SAMPLING["top_k"],
        min_p=_SAMPLING["min_p"],
        repeat_penalty=_SAMPLING["repetition_penalty"],
        presence_penalty=_SAMPLING["presence_penalty"],
        frequency_penalty=_SAMPLING["frequency_penalty"],
        seed={"type": "integer", "minimum": -1, "maximum": 2**32 - 1},
        stop=_STOP,
        stream=_TRUTH,
        response_fields=_list({"type": "string", "minLength": 1}),
        n_indent={"const": 0},
        cache_prompt=_TRUTH,
        id_slot=_WHOLE,
        samplers=_list(_TEXT),
        t_max_prompt_ms=_WHOLE,
        t_max_predict_ms=_WHOLE,
    ),
    "/tokenize": _object(
        model=_TEXT, prompt=_TEXT, messages=_CHAT, add_special_tokens=_TRUTH
    ),
    "/detokenize": _object(("tokens",), model=_TEXT, tokens=_IDS),
}
"""Bodies of requests, by path."""
_SUMMARIES = {
    "/v1/completions": "Continue texts, or fill the gap before a suffix",
    "/v1/chat/completions": "Answer a dialog",
    "/v1/messages": "Answer a dialog, in Anthropic's protocol",
    "/v1/messages/count_tokens": "Count the tokens of a dialog",
    "/infill": "Fill a gap, in llama.cpp's protocol",
    "/tokenize": "Encode a text or a dialog",
    "/detokenize": "Decode token ids",
}
_GETS = {
    "/v1/models": "List the models",
    "/v1/models/{name}": "Describe a model",
    "/tokenizer_info": "Describe a tokenizer",
    "/metrics": "Numbers for Prometheus",
    "/health": "Whether the server takes requests",
    "/openapi.json": "This document",
}
_PARAMETERS = {
    "/v1/models/{name}": ("name", "path"),
    "/tokenizer_info": ("model", "query"),
}
_OPEN = ("/health", "/openapi.json")
_ERRORS = {
    "400": "The request is wrong; the message says what",
    "401": "The API key is missing or wrong",
    "404": "There is no such model",
    "413": "The body is too large",
    "415": "The body is not JSON",
    "429": "The queue is full; try again after Retry-After seconds",
    "503": "The server is full or ending; try again after Retry-After seconds",
    "504": "The answer took too long",
}


def document() -> dict[str, Any]:
    """Return the document."""
    from llama_jax._version import __version__

    paths: dict[str, Any] = {}
    errors = {status: _response(text, "Error") for status, text in _ERRORS.items()}
    for path, body in BODIES.items():
        content = {"application/json": {"schema": body}}
        paths[path] = {
            "post": {
                "summary": _SUMMARIES[path],
                "requestBody": {"required": True, "content": content},
                "responses": {"200": {"description": "The answer"}, **errors},
            }
        }
    for path, summary in _GETS.items():
        operation: dict[str, Any] = {
            "summary": summary,
            "responses": {"200": {"description": "The answer"}},
        }
        if path in _OPEN:
            operation["security"] = []
        else:
            operation["responses"]["401"] = errors["401"]
        if path == "/health":
            operation["responses"]["503"] = {"description": "It is draining"}
        if path in _PARAMETERS:
            name, where = _PARAMETERS[path]
            parameter = {"name": name, "in": where, "schema": _TEXT}
            operation["parameters"] = [{**parameter, "required": where == "path"}]
            operation["responses"]["404"] = errors["404"]
        paths[path] = {"get": operation}
    text_or_null = {"type": ["string", "null"]}
    error = _object(
        ("message", "type", "param", "code"),
        message=_TEXT,
        type=_TEXT,
        param=text_or_null,
        code=text_or_null,
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "llama_jax", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": _object(("error",), error=error)},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _response(description: str, schema: str) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{schema}"}
    content = {"application/json": {"schema": reference}}
    return {"description": description, "content": content}
