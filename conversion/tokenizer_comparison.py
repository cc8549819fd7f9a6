"""Compare what two checkpoints say about text, by what their tokenizers do."""

from collections.abc import Iterator
from typing import TypeVar

from llama_jax.text.settings import AddedToken
from llama_jax.text.tokenizer import Tokenizer

_Key = TypeVar("_Key")
_Item = TypeVar("_Item")

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
    for name, (x, y) in different_facts(a, b, vocab_size).items():
        if isinstance(x, dict) and isinstance(y, dict):
            x, y = _without_equal(x, y), _without_equal(y, x)
        yield f"{name}: {_short(x)} and {_short(y)}"
    words = [token.text for id, token in a.tokens.items() if id < vocab_size]
    texts = [*_TEXTS, *(f"a {word} b{word}" for word in words)]
    for name in ("encode", "encode_marked"):
        for text in texts:
            ids = [_encode(t, name, text) for t in (a, b)]
            if ids[0] != ids[1]:
                yield f"{name} of {text!r}: {_short(ids[0])} and {_short(ids[1])}"
                break  # one text is enough
    unnamed = {*a.unnamed_ids(vocab_size), *b.unnamed_ids(vocab_size)}
    named = [id for id in range(vocab_size) if id not in unnamed]
    sequences = [a.encode_marked(text) for text in texts]
    sequences += [named[first : first + 64] for first in range(0, len(named), 64)]
    for sequence in sequences:
        x, y = (tokenizer.decode(sequence) for tokenizer in (a, b))
        if x != y:
            yield f"decode of {_short(sequence)}: {_short(x)} and {_short(y)}"
            break


def different_facts(
    a: Tokenizer, b: Tokenizer, vocab_size: int
) -> dict[str, tuple[object, object]]:
    """Return what two checkpoints say differently about text: names and values.

    Args: as of `compare_tokenizers`.
    """
    added = _added(a, vocab_size), _added(b, vocab_size)
    x, y = ({id: t if type(t) is str else t[0] for id, t in d.items()} for d in added)
    what = "the added tokens" if x != y else "flags of the added tokens"
    facts: dict[str, tuple[object, object]] = {
        what: added,
        "the ids that end an answer": (_ends(a, vocab_size), _ends(b, vocab_size)),
    }
    for name in ("bos_id", "eos_id", "unk_id", "pad_id", "prefix_space"):
        facts[name] = (getattr(a, name), getattr(b, name))
    for name in ("add_bos", "add_eos", "chat_templates", "sampling"):
        facts[name] = (getattr(a.settings, name), getattr(b.settings, name))
    return {name: values for name, values in facts.items() if values[0] != values[1]}


def _added(tokenizer: Tokenizer, vocab_size: int) -> dict[int, AddedToken | str]:
    """Added tokens; of special ones the text, since no text encodes to them."""
    return {
        id: token.text if token.special else token
        for id, token in sorted(tokenizer.tokens.items())
        if id < vocab_size
    }


def _ends(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    return sorted(id for id in tokenizer.end_ids if id < vocab_size)


def _encode(tokenizer: Tokenizer, name: str, text: str) -> list[int]:
    if name == "encode":
        return tokenizer.encode(text, bos=True, eos=True)
    return tokenizer.encode_marked(text)


def _without_equal(x: dict[_Key, _Item], y: dict[_Key, _Item]) -> dict[_Key, _Item]:
    return {key: value for key, value in x.items() if y.get(key) != value}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
