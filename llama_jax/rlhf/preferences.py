r"""Preference data: pairs of dialogs, of which people preferred one.

A record is one JSON object with `chosen` and `rejected`, in any of these shapes:

* HH-RLHF: two texts of the form `\n\nHuman: …\n\nAssistant: …`;
* a `prompt` (a text, or a list of messages), with two answers (a text, a message, or a
  list of messages);
* the same with `messages` or `conversations` instead of `prompt`;
* two whole dialogs, as lists of messages.

It may also have `rating`, how much better the chosen answer is (0 to 3, or the paper's
words), and `chosen_safe` and `rejected_safe`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from llama_jax.data.files import Location, Raw
from llama_jax.data.records import parse_messages
from llama_jax.errors import DataError
from llama_jax.text.dialogs import Message
from llama_jax.types import JsonObject

Margins = Literal["none", "small", "large"]
"""Margins of the ranking loss by rating (arXiv:2307.09288, table 27)."""

RATINGS = (
    "negligibly better", "slightly better", "better", "significantly better",
)  # fmt: skip
"""The paper's ratings of a chosen answer; the index of each is its number."""

_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_HH_ROLES: Mapping[str, Literal["user", "assistant"]] = {
    "Human": "user",
    "Assistant": "assistant",
}


class Preference(NamedTuple):
    """Two dialogs, each of which ends with an answer.

    Attributes:
      location: file and line.
      chosen: the preferred dialog.
      rejected: the other one.
      rating: index in `RATINGS`, None if unknown.
      safe: whether the chosen and the rejected answer are safe, None if unknown.
    """

    location: Location
    chosen: Sequence[Message]
    rejected: Sequence[Message]
    rating: int | None = None
    safe: tuple[bool, bool] | None = None


def margin(rating: int | None, margins: Margins) -> float:
    """Return the margin of the ranking loss for a rating.

    Small margins are 1, 2/3, 1/3 and 0, large ones 3, 2, 1 and 0.

    Raises:
      DataError: margins are wanted, but the rating is unknown.

    >>> margin(3, "small"), margin(3, "large"), margin(None, "none")
    (1.0, 3.0, 0.0)
    """
    if margins == "none":
        return 0.0
    if rating is None:
        raise DataError(
            f"has no rating, which {margins} margins need; rate all pairs, or use "
            "margins 'none'",
            reason="unsuitable",
        )
    return rating / 3 if margins == "small" else float(rating)


def check_margins(margins: str) -> None:
    """Raise a `DataError` if there are no margins of this name."""
    if margins not in get_args(Margins):
        choices = ", ".join(get_args(Margins))
        raise DataError(f"margins: {margins!r} does not exist; choose from {choices}")


def parse_preference(raw: Raw) -> Preference:
    """Parse the bytes of a record.

    Raises:
      DataError: it is no pair of dialogs; the message has its location.
    """
    try:
        value = json.loads(raw.data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{raw.location}: is not JSON ({error})") from error
    try:
        return _preference(raw.location, value)
    except DataError as error:
        raise DataError(f"{raw.location}: {error}", reason=error.reason) from error


def _preference(location: Location, value: object) -> Preference:
    if not isinstance(value, dict):
        raise DataError("is not an object with `chosen` and `rejected`")
    value = {key: part for key, part in value.items() if part is not None}
    if missing := [key for key in ("chosen", "rejected") if key not in value]:
        raise DataError(f"has no {missing[0]!r}; a preference needs both answers")
    prompt = _prompt(value)
    chosen, rejected = (_dialog(prompt, value[k], k) for k in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError("has two equal answers", reason="empty")
    return Preference(location, chosen, rejected, _rating(value), _safe(value))


def _prompt(value: JsonObject) -> list[Message]:
    """The messages that both answers follow; none if the dialogs are whole."""
    for key in ("prompt", "messages", "conversations"):
        if key in value:
            if key == "prompt" and isinstance(value[key], str):
                return [Message(role="user", content=value[key])]
            return parse_messages(value[key], key)
    return []


def _dialog(prompt: list[Message], answer: object, key: str) -> list[Message]:
    if isinstance(answer, str) and not prompt:
        messages = _hh_dialog(answer, key)
    elif isinstance(answer, str):
        messages = [*prompt, Message(role="assistant", content=answer)]
    else:
        parts = parse_messages(answer if isinstance(answer, list) else [answer], key)
        whole = parts[: len(prompt)] == prompt
        messages = parts if whole else [*prompt, *parts]
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise DataError(
            f"has no answer at the end of {key!r}; add it, or drop such records "
            "(on_bad, --on-bad drop)",
            reason="empty",
        )
    return messages


def _hh_dialog(text: str, key: str) -> list[Message]:
    """The dialog in a text of HH-RLHF; the assistant's empty turns are dropped."""
    before, *turns = _HH_TURN.split(text)
    if before.strip() or not turns:
        raise DataError(
            f"has a text as its {key!r} that does not begin with a Human's turn, and "
            "no prompt; give `prompt`, or HH-RLHF's form"
        )
    messages: list[Message] = []
    for name, content in zip(turns[::2], turns[1::2], strict=True):
        role = _HH_ROLES[name]
        if messages and messages[-1]["role"] == role:  # one turn in two parts
            messages[-1]["content"] += f"\n\n{content}"
        else:
            messages.append(Message(role=role, content=content))
    return messages


def _rating(value: JsonObject) -> int | None:
    rating = value.get("rating")
    if rating is None:
        return None
    if isinstance(rating, str) and rating in RATINGS:
        return RATINGS.index(rating)
    if type(rating) is int and 0 <= rating < len(RATINGS):
        return rating
    raise DataError(
        f"has {rating!r:.40} as its 'rating', not 0 to 3 or one of {', '.join(RATINGS)}"
    )


def _safe(value: JsonObject) -> tuple[bool, bool] | None:
    flags = [value.get(f"{key}_safe") for key in ("chosen", "rejected")]
    if flags == [None, None]:
        return None
    if not all(isinstance(flag, bool) for flag in flags):
        raise DataError(
            "needs true or false as both 'chosen_safe' and 'rejected_safe', or neither"
        )
    return bool(flags[0]), bool(flags[1])
