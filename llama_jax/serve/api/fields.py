"""A JSON object whose fields are taken one by one; what is left is refused."""

import json
import math
from collections.abc import Mapping
from typing import Any

from llama_jax.errors import did_you_mean
from llama_jax.serve.api.errors import ApiError


def parse_json(body: bytes) -> Any:
    """Parse a body.

    Raises:
      ApiError: it is not JSON.
    """
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


class Fields:
    """Fields of an object, by type; null is the same as absent.

    Args:
      body: the object.
      where: path of the object in the request, for errors.

    Raises:
      ApiError: it is not an object.
    """

    def __init__(self, body: Any, where: str = "") -> None:
        if not isinstance(body, Mapping):
            name = where or "the body"
            raise ApiError(f"{name}: must be an object, got {_shown(body)}")
        self._left = {name: value for name, value in body.items() if value is not None}
        self._known: list[str] = []
        self._where = where

    def value(self, name: str) -> Any:
        """Take a field of any type; None if it is absent."""
        self._known.append(name)
        return self._left.pop(name, None)

    def string(self, name: str) -> str | None:
        """Take a string."""
        value = self.value(name)
        if value is None or isinstance(value, str):
            return value
        raise self.error(name, f"must be a string, got {_shown(value)}")

    def integer(self, name: str, *, least: int | None = None) -> int | None:
        """Take an integer of at least `least`."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(name, f"must be an integer, got {_shown(value)}")
        if least is not None and value < least:
            raise self.error(name, f"must be at least {least}, got {value}")
        return value

    def number(self, name: str) -> float | None:
        """Take a finite number."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(name, f"must be a number, got {_shown(value)}")
        if abs(value) > 1e30 or not math.isfinite(value):
            raise self.error(name, f"is out of range, got {_shown(value)}")
        return float(value)

    def boolean(self, name: str) -> bool:
        """Take a boolean; False if it is absent."""
        value = self.value(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self.error(name, f"must be true or false, got {_shown(value)}")

    def strings(self, name: str, *, most: int) -> tuple[str, ...]:
        """Take a string or a list of strings, none of them empty."""
        value = self.value(name)
        values = [value] if isinstance(value, str) else value or []
        if not isinstance(values, list) or not all(
            isinstance(text, str) and text for text in values
        ):
            raise self.error(
                name, f"must be a string or a list of them, not empty: {_shown(value)}"
            )
        if len(values) > most:
            raise self.error(name, f"has {len(values)} strings; at most {most}")
        return tuple(values)

    def require(self, name: str) -> None:
        """Raise an `ApiError` if a field is absent."""
        if name not in self._left:
            raise self.error(name, "is missing")

    def end(self, *, unsupported: Mapping[str, Any] | None = None) -> None:
        """Refuse every field that was not taken.

        Args:
          unsupported: fields of the protocol that the server does not have, with the
            values that mean that they are not used.

        Raises:
          ApiError: there is such a field.
        """
        for name, value in self._left.items():
            if unsupported is not None and name in unsupported:
                if value == unsupported[name]:
                    continue
                raise self.error(
                    name,
                    "is not supported by this server; leave it out",
                    code="unsupported_field",
                )
            raise self.error(
                name,
                f"is not a field of this request{did_you_mean(name, self._known)}",
                code="unknown_field",
            )

    def error(
        self, name: str, problem: str, *, code: str = "invalid_value"
    ) -> ApiError:
        """The error for a field."""
        path = f"{self._where}.{name}" if self._where else name
        return ApiError(f"{path}: {problem}", code=code, param=path)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
