"""What a checkpoint says about text besides the pieces of its tokenizer."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from llama_jax.arguments import checked
from llama_jax.errors import TokenizerError

PrefixSpace = Literal["always", "first", "never", "always_once", "first_once"]


class AddedToken(NamedTuple):
    """A token that was added to the pieces of a tokenizer.

    Attributes:
      text: its name, or the word that it stands for.
      special: text never encodes to it. Other added tokens are one id in any text.
      normalized: it is matched after the text is normalized, as `tokenizers` does.
      lstrip, rstrip: it includes the whitespace before or after it.
      single_word: it is no part of a longer word.

    >>> AddedToken("<|im_end|>").special
    True
    """

    text: str
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


def added_token(fields: Mapping[str, Any]) -> AddedToken:
    """Return an added token as `tokenizers` describes it in its files.

    Raises:
      KeyError: it has no `content`.
    """
    special = bool(fields.get("special"))
    flags = {
        name: bool(fields.get(name)) for name in ("lstrip", "rstrip", "single_word")
    }
    normalized = bool(fields.get("normalized", not special))
    return AddedToken(str(fields["content"]), special, normalized, **flags)


def filler(id: int) -> str:
    """The name of an id without a token in files that number tokens without gaps."""
    return f"[PAD{id}]"


def listed_tokens(listed: Iterable[Mapping[str, Any]]) -> dict[int, AddedToken]:
    """Return the `added_tokens` of a `tokenizer.json` by id, without fillers.

    Raises:
      KeyError: an entry has no `id` or no `content`.
    """
    tokens = {int(fields["id"]): added_token(fields) for fields in listed}
    return {id: token for id, token in tokens.items() if token.text != filler(id)}


@checked(TokenizerError)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSettings:
    """What a checkpoint says about text besides the pieces of its tokenizer.

    Attributes:
      added_tokens: by id; an id of a piece must have the piece's text.
      bos_id, eos_id, unk_id, pad_id: replace those of the tokenizer's file; -1 is none.
      end_ids: ids that end an answer, besides the end of sequence.
      add_bos: a prompt begins with the begin of sequence.
      add_eos: a prompt ends with the end of sequence.
      prefix_space: where SentencePiece adds a space: at the beginning of a text and
        after added tokens ("always"), only at the beginning ("first"), or not at all
        ("never"); with "_once", not before text that begins with a space. None is what
        the tokenizer's file says.
      chat_templates: Jinja templates by name; "default" is that of a plain chat.
      sampling: defaults of `Sampling`'s fields.

    >>> tokens = {7: AddedToken("<|im_end|>")}
    >>> settings = TextSettings(added_tokens=tokens, end_ids=(7,))
    >>> TextSettings.from_dict(settings.to_dict()) == settings
    True
    """

    added_tokens: Mapping[int, AddedToken] = dataclasses.field(default_factory=dict)
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    end_ids: tuple[int, ...] = ()
    add_bos: bool = True
    add_eos: bool = False
    prefix_space: PrefixSpace | None = None
    chat_templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not the default, for JSON."""
        fields: dict[str, Any] = {}
        for field in _FIELDS:
            value = getattr(self, field.name)
            if value != getattr(_DEFAULT, field.name):
                fields[field.name] = value
        if self.added_tokens:
            fields["added_tokens"] = {
                str(id): token._asdict() for id, token in self.added_tokens.items()
            }
        if self.end_ids:
            fields["end_ids"] = list(self.end_ids)
        return fields

    @classmethod
    @checked(TokenizerError)
    def from_dict(cls, fields: Mapping[str, Any]) -> "TextSettings":
        """The inverse of `to_dict`.

        Raises:
          TokenizerError: a field is unknown, or of the wrong type.
        """
        values = {field.name: getattr(_DEFAULT, field.name) for field in _FIELDS}
        if unknown := sorted(fields.keys() - values.keys()):
            raise TokenizerError(
                f"text settings: unknown fields {', '.join(unknown)}; was this written "
                "by a newer llama_jax?"
            )
        values |= fields
        try:
            tokens = values["added_tokens"].items()
            values["added_tokens"] = {
                int(id): token if isinstance(token, AddedToken) else AddedToken(**token)
                for id, token in tokens
            }
            values["end_ids"] = tuple(values["end_ids"])
        except (TypeError, ValueError, AttributeError) as error:
            raise TokenizerError(
                f"text settings: {error}; convert the model again"
            ) from error
        for name, value in values.items():
            if not _is_valid(name, value):
                raise TokenizerError(
                    f"text settings: {name} is {value!r:.60}, which is of the wrong "
                    "type; convert the model again"
                )
        return cls(**values)


def _is_valid(name: str, value: Any) -> bool:
    """Whether a value from a JSON file has the type of a field."""
    match name:
        case "added_tokens":
            kinds = [str, *[bool] * (len(AddedToken._fields) - 1)]
            return all(
                [type(part) for part in token] == kinds for token in value.values()
            )
        case "end_ids":
            return all(type(id) is int for id in value)
        case "add_bos" | "add_eos":
            return type(value) is bool
        case "prefix_space":
            return value is None or value in get_args(PrefixSpace)
        case "chat_templates":
            return type(value) is dict and all(type(v) is str for v in value.values())
        case "sampling":
            numbers = (int, float)
            return type(value) is dict and all(
                type(v) in numbers for v in value.values()
            )
        case _:
            return value is None or type(value) is int


_FIELDS = dataclasses.fields(TextSettings)
_DEFAULT = TextSettings()
