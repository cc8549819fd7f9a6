"""Errors as clients see them: a status, and a body in OpenAI's shape."""

from typing import Any

from llama_jax.errors import (
    LlamaJaxError,
    PromptError,
    PromptTooLong,
    QueueFull,
    ServeError,
    UnsafePromptError,
)

RETRY_SECONDS = 1


class ApiError(ServeError):
    """A request is refused.

    Attributes:
      status: of the response.
      code: a word for programs.
      param: the field that is wrong.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def kind(self) -> str:
        """The `type` of the error in OpenAI's shape."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        return kinds.get(self.status, other)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_SECONDS)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}

    def body(self) -> dict[str, Any]:
        """The body of the response."""
        fields = {"message": str(self), "type": self.kind, "param": self.param}
        return {"error": {**fields, "code": self.code}}


def api_error(error: Exception) -> ApiError:
    """Return what a client is to see of an error."""
    text = str(error)
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLong):
        return ApiError(text, code="context_length_exceeded", param="prompt")
    if isinstance(error, QueueFull):
        return ApiError(text, status=429, code="queue_full")
    if isinstance(error, ServeError):
        return ApiError(text, status=503, code="unavailable")
    if isinstance(error, UnsafePromptError):
        return ApiError(text, code="unsafe_prompt", param="messages")
    if isinstance(error, PromptError):
        return ApiError(text, code="invalid_value")
    if isinstance(error, TimeoutError):
        message = "the answer took longer than the server allows; ask for fewer tokens"
        return ApiError(message, status=504, code="timeout")
    if isinstance(error, LlamaJaxError):
        return ApiError(text, status=500, code="model_error")
    message = f"the server failed ({type(error).__name__}); its log says where"
    return ApiError(message, status=500, code="internal_error")
