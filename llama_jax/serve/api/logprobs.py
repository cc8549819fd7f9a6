"""Log-probabilities in OpenAI's two shapes: of completions and of chats."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from llama_jax.serve.jobs import TokenLogprob
from llama_jax.text.tokenizer import StreamDecoder, Tokenizer


def token_bytes(tokenizer: Tokenizer, id: int) -> bytes:
    """The UTF-8 bytes of a token; of half a character too. Special ones have none."""
    text = tokenizer.decode_infilling([id])
    if "\ufffd" not in text:
        return text.encode()
    piece = tokenizer.piece(id)
    if tokenizer.has_pieces and len(piece) == 6 and piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    return text.encode()


def token_name(tokenizer: Tokenizer, id: int) -> str:
    r"""The text of a token; `bytes:\\xe2` for a part of a character, `<s>` as it is."""
    raw = token_bytes(tokenizer, id)
    if not raw:
        return tokenizer.piece(id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprob]
) -> dict[str, Any]:
    """Log-probabilities of a chat's answer."""

    def described(id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_name(tokenizer, id),
            "logprob": logprob,
            "bytes": list(token_bytes(tokenizer, id)),
        }

    content = [
        {
            **described(entry.id, entry.logprob),
            "top_logprobs": [described(*pair) for pair in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


class ScoredToken(NamedTuple):
    """A token of a completion, or of its prompt, whose first has no probability."""

    id: int
    logprob: float | None
    top: Sequence[tuple[int, float]] | None


class OffsetWriter:
    """Writes log-probabilities of completions; offsets go on from call to call.

    Args:
      tokenizer: of the ids.
      after_marker: as of `StreamDecoder`.
      start: offset of the first token.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, after_marker: bool, start: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, after_marker=after_marker)
        self._offset = start

    def write(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """Return the `logprobs` of a choice or of a chunk."""
        names, offsets = [], []
        for token in tokens:
            names.append(token_name(self._tokenizer, token.id))
            offsets.append(self._offset)
            self._offset += len(self._decoder.push([token.id]))
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: ScoredToken) -> dict[str, float] | None:
        if token.top is None or token.logprob is None:
            return None
        top = {token_name(self._tokenizer, id): value for id, value in token.top}
        # As OpenAI's: the chosen token is one of them.
        return {token_name(self._tokenizer, token.id): token.logprob, **top}
