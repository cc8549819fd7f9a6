"""The text settings of a Hugging Face folder, which are in up to eight files.

Where the fast and slow tokenizers of transformers 4 and those of transformers 5 read
them differently, this is how the fast ones of 4 do, with the folder's `tokenizer.json`.
"""

import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from llama_jax.checkpoint.json_files import read_json
from llama_jax.conversion.huggingface_generation import read_ends, read_sampling
from llama_jax.errors import TokenizerError
from llama_jax.text.byte_level_json import steps
from llama_jax.text.sentencepiece_json import prefix_space_of
from llama_jax.text.settings import (
    AddedToken,
    PrefixSpace,
    TextSettings,
    added_token,
    filler,
)
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import JsonObject

MODEL, JSON = "tokenizer.model", "tokenizer.json"
ADDED, CONFIG, SPECIAL = (
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_NAMES = ("bos", "eos", "unk", "pad")


class HuggingFaceText(NamedTuple):
    """The tokenizer of a folder.

    Attributes:
      tokenizer: with all that the folder says about text.
      file: of the tokenizer.
      notes: sentences about what the folder says and the tokenizer does not.
    """

    tokenizer: Tokenizer
    file: pathlib.Path
    notes: tuple[str, ...]


def read_text(folder: pathlib.Path, vocab_size: int) -> HuggingFaceText:
    """Read the tokenizer of a Hugging Face folder.

    Args:
      folder: of the checkpoint.
      vocab_size: of the model; added ids beyond it are dropped, since some folders list
        more than were trained.

    Raises:
      TokenizerError: there is none, or a file is damaged.
    """
    file = next((f for n in (MODEL, JSON) if (f := folder / n).is_file()), None)
    if file is None:
        raise TokenizerError(
            f"{folder}: there is no {MODEL} or {JSON}; name a tokenizer with "
            "--tokenizer FILE (tokenizer=)"
        )
    return _Folder(folder, vocab_size, file).read()


class _Folder:
    """The files of a folder, and what is wrong in them."""

    def __init__(
        self, folder: pathlib.Path, vocab_size: int, file: pathlib.Path
    ) -> None:
        self.folder, self.vocab_size, self.file = folder, vocab_size, file
        self.base = Tokenizer.from_file(file)
        self.config = self.optional(CONFIG)
        self.spec = self.optional(JSON)
        self.special = {**self.optional(SPECIAL), **self.config}
        self.notes: list[str] = []

    def optional(self, name: str) -> JsonObject:
        file = self.folder / name
        return read_json(file) if file.is_file() else {}

    def read(self) -> HuggingFaceText:
        tokens = self.added_tokens()
        texts = {token.text: id for id, token in tokens.items()}
        named = {name: self.special_id(name, texts) for name in _NAMES}
        ids = {
            name: getattr(self.base, f"{name}_id") if id is None else id
            for name, id in named.items()
        }
        ends, notes = read_ends(self.folder, ids, self.vocab_size)
        add_bos, add_eos = self.begin_and_end(ids["bos"])
        tokenizer = Tokenizer(
            self.base.contents,
            settings=TextSettings(
                added_tokens=tokens,
                bos_id=ids["bos"],
                eos_id=ids["eos"],
                unk_id=ids["unk"],
                pad_id=ids["pad"],
                end_ids=ends,
                add_bos=add_bos,
                add_eos=add_eos,
                prefix_space=self.prefix_space(),
                chat_templates=self.chat_templates(),
                sampling=read_sampling(self.folder),
            ),
        )
        return HuggingFaceText(tokenizer, self.file, (*self.notes, *notes))

    def added_tokens(self) -> dict[int, AddedToken]:
        """The added tokens of all files; `tokenizer_config.json` has the last word."""
        tokens: dict[int, AddedToken] = {}
        for name, id in self.optional(ADDED).items():
            if type(id) is not int:
                raise TokenizerError(
                    f"{self.folder / ADDED}: the id of {name!r} is {id!r}; it must be "
                    "an integer"
                )
            # The file says no more than the name, so tags are taken for special.
            is_tag = re.fullmatch(r"▁?[<\[].*[>\]]", name) is not None
            tokens[id] = AddedToken(name, special=is_tag)
        for file, listed in (
            (JSON, self.spec.get("added_tokens")),
            (CONFIG, self.config.get("added_tokens_decoder")),
        ):
            for id, fields in _entries(self.folder / file, listed):
                tokens[id] = added_token(fields)
        special = set(self.special_texts())
        tokens = {
            id: token._replace(special=token.special or token.text in special)
            for id, token in tokens.items()
            if token.text != filler(id)
        }
        pieces = self.base.vocab_size
        pieces_of_other_names = [
            id
            for id, token in tokens.items()
            if id < pieces and self.base.piece(id) != token.text
        ]
        if pieces_of_other_names:
            id = pieces_of_other_names[0]
            self.notes.append(
                f"added token {tokens[id].text!r} is left out: its id {id} is "
                f"{self.base.piece(id)!r}"
            )
        if beyond := [id for id in tokens if id >= max(self.vocab_size, pieces)]:
            self.notes.append(
                f"added tokens from id {min(beyond)} on are left out: the model has "
                f"{self.vocab_size} ids"
            )
        return {
            id: token
            for id, token in sorted(tokens.items())
            if id not in (*beyond, *pieces_of_other_names)
        }

    def special_texts(self) -> Iterator[str]:
        """The texts that are declared special by name."""
        more = ("additional_special_tokens", "extra_special_tokens")
        for key in (*(f"{name}_token" for name in _NAMES), *more):
            value = self.special.get(key)
            values = value.values() if key in more and isinstance(value, dict) else (
                value if isinstance(value, list) else [value]
            )  # fmt: skip
            for token in values:
                content = token.get("content") if isinstance(token, dict) else token
                if isinstance(content, str):
                    yield content

    def special_id(self, name: str, added: Mapping[str, int]) -> int | None:
        """The id of a special token by its text; None is that of the tokenizer."""
        token = self.special.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text is None or text == "":
            return None
        id = added.get(text) if isinstance(text, str) else None
        if id is None and isinstance(text, str):
            id = self.base.piece_id(text)
        if id is None or id >= max(self.vocab_size, self.base.vocab_size):
            self.notes.append(
                f"{name}_token {text!r:.60} is left out: no token of the model has "
                "this text"
            )
            return None
        return id

    def begin_and_end(self, bos_id: int) -> tuple[bool, bool]:
        """Whether a prompt begins with BOS and ends with EOS."""
        rule = self.post_processor() if self.spec else None
        kind = str(self.config.get("tokenizer_class") or "Llama")
        if rule is not None and "Llama" not in kind:
            return rule
        add_bos, add_eos = rule or (bos_id >= 0, False)
        flags = self.flag("add_bos_token"), self.flag("add_eos_token")
        return (
            add_bos if flags[0] is None else flags[0],
            add_eos if flags[1] is None else flags[1],
        )

    def flag(self, key: str) -> bool | None:
        value = self.config.get(key)
        if value is not None and type(value) is not bool:
            raise TokenizerError(
                f"{self.folder / CONFIG}: {key} is {value!r:.60}; it must be true or "
                "false"
            )
        return value

    def post_processor(self) -> tuple[bool, bool] | None:
        """What a `tokenizer.json` puts around a text; None if it has another rule."""
        all_steps = steps(self.spec, "post_processor")
        templates = [s for s in all_steps if s.get("type") == "TemplateProcessing"]
        if not templates:
            return (False, False)
        parts = ["Sequence" in part for part in templates[0].get("single") or ()]
        if parts.count(True) != 1 or len(templates) > 1:
            return None
        return (not parts[0], not parts[-1])

    def prefix_space(self) -> PrefixSpace | None:
        """Where a space is added; None is as the tokenizer's file says."""
        if not self.base.has_pieces:
            return None
        add_prefix, legacy = self.flag("add_prefix_space"), self.flag("legacy")
        if add_prefix is False:
            return "never"
        if self.spec and self.file.name != JSON:
            rule = prefix_space_of(self.spec)
            if rule is None:
                self.notes.append(
                    f"{JSON} handles spaces in a way of its own; {MODEL} is followed"
                )
            return rule
        # Tokenizers made from SentencePiece's file without `legacy` use Metaspace.
        if not self.spec and legacy is False and self.base.prefix_space == "always":
            return "first_once"
        return None

    def chat_templates(self) -> dict[str, str]:
        """The templates by name; files of their own replace those of the settings."""
        listed = self.config.get("chat_template")
        templates: dict[str, Any] = {}
        if isinstance(listed, str):
            templates["default"] = listed
        elif isinstance(listed, dict):
            templates = dict(listed)
        elif isinstance(listed, list):
            templates = {
                str(entry.get("name")): entry.get("template")
                for entry in listed
                if isinstance(entry, dict)
            }
        if listed and not (
            templates and all(type(t) is str for t in templates.values())
        ):
            raise TokenizerError(
                f"{self.folder / CONFIG}: chat_template must be a text, or a list of "
                "objects with `name` and `template`"
            )
        files = {"default": self.folder / TEMPLATE}
        more = sorted((self.folder / TEMPLATES).glob("*.jinja"))
        for name, file in (files | {file.stem: file for file in more}).items():
            if file.is_file():
                templates[name] = _read(file)
        return templates


def _entries(file: pathlib.Path, listed: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield id and fields of each added token in a file."""
    if listed is None:
        return
    entries = listed.items() if isinstance(listed, dict) else (
        (token.get("id") if isinstance(token, dict) else None, token)
        for token in (listed if isinstance(listed, list) else [None])
    )  # fmt: skip
    for id, token in entries:
        if (
            not isinstance(token, dict)
            or not isinstance(token.get("content"), str)
            or not re.fullmatch(r"\d{1,9}", str(id))
        ):
            raise TokenizerError(
                f"{file}: the list of added tokens has the entry {str(id)[:20]!r}; "
                "each must be an id and an object with `content`"
            )
        yield int(str(id)), token


def _read(file: pathlib.Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{file}: cannot be read ({error})") from error
