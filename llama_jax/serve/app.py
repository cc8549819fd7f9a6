"""The ASGI application: routes, keys and limits; protocols are in `serve.api`."""

import asyncio
import contextlib
import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llama_jax.errors import LlamaJaxError
from llama_jax.serve.api import anthropic, infill, tokens
from llama_jax.serve.api.call import Call, Served
from llama_jax.serve.api.chat import Chat
from llama_jax.serve.api.completions import Completions
from llama_jax.serve.api.errors import ApiError, api_error
from llama_jax.serve.api.fields import Fields, parse_json
from llama_jax.serve.api.openapi import document
from llama_jax.serve.metrics import Metrics
from llama_jax.serve.models import Models, ServedModel
from llama_jax.serve.page_files import PAGE_HEADERS, read_page
from llama_jax.serve.running import answer
from llama_jax.serve.settings import ServeConfig

CALLS: dict[str, Callable[[Served, Fields], Call]] = {
    "/v1/completions": Completions,
    "/v1/chat/completions": Chat,
    "/v1/messages": anthropic.Messages,
    "/infill": infill.Infill,
}
"""Paths whose answers are generated."""
QUESTIONS: dict[str, Callable[[Served, Fields], dict[str, Any]]] = {
    "/tokenize": tokens.tokenize,
    "/detokenize": tokens.detokenize,
    "/v1/messages/count_tokens": anthropic.count_tokens,
}
"""Paths whose answers need no engine."""

_log = logging.getLogger("llama_jax.serve")


class App:
    """The handlers of a server.

    Args:
      models: that are served.
      config: of the server.

    Attributes:
      asgi: the application.
      draining: set it to refuse new requests.
    """

    def __init__(self, models: Models, config: ServeConfig) -> None:
        self._models, self._config = models, config
        self._metrics = Metrics(models)
        self._open = 0
        self.draining = False
        middleware = []
        if config.origins:
            middleware.append(
                Middleware(
                    CORSMiddleware,
                    allow_origins=list(config.origins),
                    allow_methods=["GET", "POST"],
                    allow_headers=["*"],
                )
            )
        guard = self._guard
        routes = [
            Route(path, guard(self._call(make)), methods=["POST"])
            for path, make in CALLS.items()
        ]
        routes += [
            Route(path, guard(self._question(reply)), methods=["POST"])
            for path, reply in QUESTIONS.items()
        ]
        routes += [
            Route("/v1/models", guard(self._list_models)),
            Route("/v1/models/{name:path}", guard(self._get_model)),
            Route("/tokenizer_info", guard(self._tokenizer_info)),
            Route("/metrics", guard(self._get_metrics)),
            Route("/health", self._health),
            Route("/openapi.json", self._openapi),
            Route("/", self._page),
            Route("/page/{name}", self._page),
        ]
        handlers: dict[Any, Any] = {Exception: _handle_error, 404: _no_page}
        handlers |= {405: _wrong_method}
        self.asgi = Starlette(
            routes=routes, middleware=middleware, exception_handlers=handlers
        )

    def _guard(
        self, handler: Callable[[HttpRequest], Awaitable[Response]]
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        """Check key and load before a handler, and write its errors."""

        async def guarded(request: HttpRequest) -> Response:
            anthropic_shape = request.url.path.startswith("/v1/messages")
            try:
                self._check_key(request)
                response = await handler(request)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception as error:
                if not isinstance(error, LlamaJaxError | TimeoutError):
                    _log.exception("%s failed", request.url.path)
                response = error_response(api_error(error), anthropic_shape)
            self._metrics.count(request.scope["path"], response.status_code)
            return response

        return guarded

    def _check_key(self, request: HttpRequest) -> None:
        if self._config.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = request.headers.get("x-api-key", "")
        if not hmac.compare_digest(key.encode(), self._config.api_key.encode()):
            raise ApiError(
                "the API key is missing or wrong; send Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
            )

    def _call(
        self, make: Callable[[Served, Fields], Call]
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        async def handle(request: HttpRequest) -> Response:
            if self.draining:
                raise ApiError("the server is ending", status=503, code="unavailable")
            if self._open >= self._config.max_open:
                message = f"{self._open} requests are open; try again later"
                raise ApiError(message, status=503, code="overloaded")
            self._open += 1
            try:
                model, fields = await self._read(request)
                call = await asyncio.to_thread(make, model.served, fields)
                response = await answer(
                    request, model.engine, call, self._config.time_limit
                )
            except BaseException:
                self._open -= 1
                raise
            if not call.stream:
                self._open -= 1
                return response
            return _Closing(response, self._close)

        return handle

    def _close(self) -> None:
        self._open -= 1

    def _question(
        self, reply: Callable[[Served, Fields], dict[str, Any]]
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        async def handle(request: HttpRequest) -> Response:
            model, fields = await self._read(request)
            result = await asyncio.to_thread(reply, model.served, fields)
            return JSONResponse(result)

        return handle

    async def _read(self, request: HttpRequest) -> tuple[ServedModel, Fields]:
        """Read a body, and choose its model."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind.lower() != "application/json":
            raise ApiError(
                f"the content type is {kind or 'missing'}; send application/json",
                status=415,
                code="wrong_content_type",
            )
        limit, body = self._config.max_body, bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise ApiError(
                    f"the body is larger than {limit} bytes",
                    status=413,
                    code="body_too_large",
                )
        fields = Fields(parse_json(bytes(body)))
        return self._models.get(fields.string("model")), fields

    async def _list_models(self, request: HttpRequest) -> Response:
        data = [_describe_model(model.served) for model in self._models]
        return JSONResponse({"object": "list", "data": data})

    async def _get_model(self, request: HttpRequest) -> Response:
        model = self._models.get(request.path_params["name"])
        return JSONResponse(_describe_model(model.served))

    async def _tokenizer_info(self, request: HttpRequest) -> Response:
        model = self._models.get(request.query_params.get("model"))
        return JSONResponse(tokens.tokenizer_info(model.served))

    async def _get_metrics(self, request: HttpRequest) -> Response:
        return Response(self._metrics.text(), media_type=Metrics.CONTENT_TYPE)

    async def _health(self, request: HttpRequest) -> Response:
        status = "draining" if self.draining else "ok"
        return JSONResponse({"status": status}, 503 if self.draining else 200)

    async def _openapi(self, request: HttpRequest) -> Response:
        return JSONResponse(document())

    async def _page(self, request: HttpRequest) -> Response:
        name = request.path_params.get("name", "index.html")
        page = read_page(name)
        if page is None:
            return await _no_page(request, Exception())
        contents, kind = page
        return Response(contents, media_type=kind, headers=PAGE_HEADERS)


class _Closing(Response):
    """A response that calls a function when it has been sent."""

    def __init__(self, response: Response, close: Callable[[], None]) -> None:
        self._response, self._close = response, close
        self.status_code, self.background = response.status_code, None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the response."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            await self._response(scope, receive, send)


def error_response(error: ApiError, anthropic_shape: bool = False) -> Response:
    """Return the response that a client sees."""
    body = anthropic.error_body(error) if anthropic_shape else error.body()
    return JSONResponse(body, error.status, headers=error.headers)


def _describe_model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": 0,
        "owned_by": "llama_jax",
        "max_model_len": served.context,
    }


async def _handle_error(request: HttpRequest, error: Exception) -> Response:
    return error_response(api_error(error))


async def _no_page(request: HttpRequest, error: Exception) -> Response:
    message = f"{request.url.path}: there is no such path; see /openapi.json"
    return error_response(ApiError(message, status=404, code="not_found"))


async def _wrong_method(request: HttpRequest, error: Exception) -> Response:
    allowed = getattr(error, "headers", None) or {}
    method = allowed.get("Allow", "another method")
    message = f"{request.url.path}: {request.method} is not possible; use {method}"
    wrong = ApiError(message, status=405, code="wrong_method")
    return JSONResponse(wrong.body(), 405, headers=dict(allowed))
