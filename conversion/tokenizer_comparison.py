"""Compare what two checkpoints say about text, by what their tokenizers do."""

from collections.abc import Iterator

from llama_jax.text.settings import AddedToken
from llama_jax.text.tokenizer import Tokenizer

_TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    " leading,  double and trailing spaces  ",
    "naïve Größe, Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย",
    "日本語と中文，한국어 🐕 12345",
    "def f(x):\n\treturn x**2\n\n",
    "<s> </s> <0x41> [INST] ﬁ ½",
    "",
)
_SHOWN = 60  # characters of a value in a difference


def compare_tokenizers(a: Tokenizer, b: Tokenizer, vocab_size: int) -> Iterator[str]:
    """Yield the differences between two tokenizers of a model, as sentences.

    Args:
      a: the reference.
      b: the other one.
      vocab_size: of the model; ids beyond it are not compared.
    """
    for name in ("bos_id", "eos_id", "unk_id"):
        yield from _differs(name, getattr(a, name), getattr(b, name))
    ends = (sorted(id for id in t.end_ids if id < vocab_size) for t in (a, b))
    yield from _differs("the ids that end an answer", *ends)
    for name in ("add_bos", "add_eos", "chat_templates", "sampling"):
        yield from _differs(name, getattr(a.settings, name), getattr(b.settings, name))
    yield from _differs("the added tokens", *(_added(t, vocab_size) for t in (a, b)))
    words = [token.text for token in _added(a, vocab_size).values()]
    texts = [*_TEXTS, *(f"a {word} b{word}" for word in words)]
    for name in ("encode", "encode_marked"):
        for text in texts:
            ids = [_encode(t, name, text) for t in (a, b)]
            if ids[0] != ids[1]:
                yield f"{name} of {text!r}: {_short(ids[0])} and {_short(ids[1])}"
                break  # one text is enough
    for text in texts:
        marked = _encode(a, "encode_marked", text)
        decoded = [t.decode(marked) for t in (a, b)]
        if decoded[0] != decoded[1]:
            yield f"decode of {_short(marked)}: {decoded[0]!r} and {decoded[1]!r}"
            break


def _added(tokenizer: Tokenizer, vocab_size: int) -> dict[int, AddedToken]:
    """Added tokens, without control pieces that are special in any case."""
    tokens = tokenizer.settings.added_tokens
    return {
        id: token
        for id, token in sorted(tokens.items())
        if id < vocab_size and (id >= tokenizer.vocab_size or not token.special)
    }


def _encode(tokenizer: Tokenizer, name: str, text: str) -> list[int]:
    if name == "encode":
        return tokenizer.encode(text, bos=True, eos=True)
    return tokenizer.encode_marked(text)


def _differs(name: str, a: object, b: object) -> Iterator[str]:
    if a != b:
        yield f"{name}: {_short(a)} and {_short(b)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
