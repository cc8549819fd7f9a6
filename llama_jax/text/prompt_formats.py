"""Chat, instruction and infilling formats: pure functions from text to token ids.

Each `PromptFormat` encodes dialogs as its family of models was trained on them: as a
prompt (`encode`), or in spans that mark the answers (`spans`, for training).
"""

import datetime
import re
from collections.abc import Iterator, Sequence

from llama_jax.arguments import checked
from llama_jax.errors import PromptError, did_you_mean
from llama_jax.text.chat_template import (
    DEFAULT,
    TEMPLATE,
    is_template,
    template_format,
)
from llama_jax.text.dialogs import Dialog, Message, PromptFormat, Span, pairs
from llama_jax.text.tokenizer import Tokenizer

__all__ = [
    "FORMATS",
    "UNSAFE_ANSWER",
    "Dialog",
    "Message",
    "PromptFormat",
    "Span",
    "completion_prompt",
    "default_format",
    "get_format",
    "infilling_prompt",
]

UNSAFE_ANSWER = "Error: special tags are not allowed as part of the prompt."
"""The answer of Meta's chat code to a prompt that raises `UnsafePromptError` here."""


def _turn(
    tokenizer: Tokenizer, prompt: str, answer: str | None, *, bos: bool = True
) -> Iterator[Span]:
    """Yield a prompt and, if given, its answer with the end of sequence.

    The answer is encoded as a continuation of the prompt. If it begins with a space,
    prompt and answer have the ids of both encoded as one text.
    """
    yield Span(tokenizer.encode(prompt, bos=bos, eos=False), False)
    if answer is not None:
        yield Span([*tokenizer.encode_infilling(answer), tokenizer.eos_id], True)


def _write_llama2(tokenizer: Tokenizer, dialog: Dialog) -> Iterator[Span]:
    system, turns = pairs(dialog)
    for message, answer in turns:
        user = message["content"]
        if system is not None:
            user, system = f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}", None
        padded = None if answer is None else f" {answer.strip()} "
        yield from _turn(tokenizer, f"[INST] {user.strip()} [/INST]", padded)


def _write_codellama_70b(tokenizer: Tokenizer, dialog: Dialog) -> Iterator[Span]:
    step = _special(tokenizer, "codellama-70b-instruct", "<step>")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, bos=False, eos=False)

    last = dialog[-1] if dialog[-1]["role"] == "assistant" else None
    history = [*dialog] if last is None else [*dialog[:-1]]
    if history[0]["role"] != "system":
        history.insert(0, {"role": "system", "content": ""})
    yield Span([tokenizer.bos_id], False)
    for message in history:
        header = f" Source: {message['role']}"
        if "destination" in message:
            header += f"\nDestination: {message['destination'].strip()}"
        yield Span(encode(header), False)
        is_answer = message["role"] == "assistant"
        if content := message["content"].strip():
            yield Span(encode("\n\n"), False)
            yield Span(tokenizer.encode_infilling(f" {content}"), is_answer)
        yield Span([step], is_answer)
    # The last answer is encoded as the model generates it, after the prompt's space;
    # earlier answers as Meta's code encodes a history.
    recipient = "user" if last is None else last.get("destination", "user").strip()
    yield Span(encode(f" Source: assistant\nDestination: {recipient}"), False)
    yield Span(encode("\n\n "), False)
    if last is not None:
        yield Span([*tokenizer.encode_infilling(last["content"].strip()), step], True)


_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}{input}"
    "\n\n### Response:"
)
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions."
)


def _write_alpaca(tokenizer: Tokenizer, dialog: Dialog) -> Iterator[Span]:
    ((message, answer),) = pairs(dialog)[1]
    text = message.get("input", "")
    prompt = _ALPACA.format(
        paired=", paired with an input that provides further context" if text else "",
        instruction=message["content"],
        input=f"\n\n### Input:\n{text}" if text else "",
    )
    yield from _turn(tokenizer, prompt, answer)


def _write_wizardlm_7b(tokenizer: Tokenizer, dialog: Dialog) -> Iterator[Span]:
    ((message, answer),) = pairs(dialog)[1]
    yield from _turn(tokenizer, f"{message['content']}\n\n### Response:", answer)


def _write_vicuna(tokenizer: Tokenizer, dialog: Dialog) -> Iterator[Span]:
    system, turns = pairs(dialog)
    opening = f"{_VICUNA if system is None else system} "
    for i, (message, answer) in enumerate(turns):
        prompt = f"{'' if i else opening}USER: {message['content']} ASSISTANT:"
        padded = None if answer is None else f" {answer}"
        yield from _turn(tokenizer, prompt, padded, bos=i == 0)


_CHATML_TAGS = ("<|im_start|>", "<|im_end|>")


def _write_orca2(tokenizer: Tokenizer, dialog: Dialog) -> Iterator[Span]:
    start, end = _CHATML_TAGS
    text, bos = "", True
    for message in dialog:
        text += f"{start}{message['role']}\n"
        if message["role"] == "assistant":
            yield Span(_encode_chatml(tokenizer, text, bos=bos), False)
            text, bos = f"{message['content']}{end}", False
            yield Span(_encode_chatml(tokenizer, text, bos=bos), True)
            text = "\n"
        else:
            text += f"{message['content']}{end}\n"
    if dialog[-1]["role"] == "user":
        text += f"{start}assistant\n"
        yield Span(_encode_chatml(tokenizer, text, bos=bos), False)


def _encode_chatml(tokenizer: Tokenizer, text: str, *, bos: bool) -> list[int]:
    """Encode `text`, with its tags as tokens if the tokenizer has them."""
    ids = [tokenizer.bos_id] if bos else []
    parts = re.split("(" + "|".join(map(re.escape, _CHATML_TAGS)) + ")", text)
    if None in map(tokenizer.piece_id, _CHATML_TAGS):
        parts = [text]
    for i, part in enumerate(parts):
        if (tag := tokenizer.piece_id(part)) is not None and part in _CHATML_TAGS:
            ids.append(tag)
        elif bos and i == 0:
            ids += tokenizer.encode(part, bos=False, eos=False)
        else:  # without the space that begins a text
            ids += tokenizer.encode_infilling(part)
    return ids


# Text never encodes to Llama 3's special tokens, so no text is unsafe.
_LLAMA3_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")


def _write_llama3(tokenizer: Tokenizer, dialog: Dialog) -> Iterator[Span]:
    start, end, eot = (
        _special(tokenizer, "llama3", f"<|{name}|>")
        for name in ("start_header_id", "end_header_id", "eot_id")
    )

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, bos=False, eos=False)

    def header(role: str) -> Span:
        return Span([start, *encode(role), end, *encode("\n\n")], False)

    yield Span([tokenizer.bos_id], False)
    for message in dialog:
        yield header(message["role"])
        content = encode(message["content"].strip())
        yield Span([*content, eot], message["role"] == "assistant")
    if dialog[-1]["role"] != "assistant":
        yield header("assistant")


def _special(tokenizer: Tokenizer, format: str, piece: str) -> int:
    """The id of a special token that a format requires."""
    id = tokenizer.piece_id(piece)
    if id is None:
        raise PromptError(
            f"{format}: the tokenizer has no piece {piece}; choose another format"
        )
    return id


_LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
_CODELLAMA_TAGS = (*_LLAMA2_TAGS, "<step>")

_FORMATS = (
    PromptFormat(name="llama2-chat", write=_write_llama2, tags=_LLAMA2_TAGS),
    PromptFormat(name="codellama-instruct", write=_write_llama2, tags=_CODELLAMA_TAGS),
    PromptFormat(
        name="codellama-70b-instruct", write=_write_codellama_70b,
        tags=_CODELLAMA_TAGS, stop_tokens=("<step>",), keys=("destination",),
    ),
    PromptFormat(name="llama3", write=_write_llama3, stop_tokens=_LLAMA3_ENDS),
    PromptFormat(
        # Its models sometimes continue with a new instruction instead of ending.
        name="alpaca", write=_write_alpaca, stop_strings=("\n\n### Instruction:",),
        system=False, turns=False, keys=("input",),
    ),
    PromptFormat(name="vicuna", write=_write_vicuna),
    PromptFormat(
        name="orca2", write=_write_orca2, tags=_CHATML_TAGS,
        stop_tokens=("<|im_end|>", "</s>"), stop_strings=("<|im_end|>",),
    ),
    PromptFormat(name="wizardlm", write=_write_vicuna),
    PromptFormat(
        name="wizardlm-7b", write=_write_wizardlm_7b, system=False, turns=False
    ),
)  # fmt: skip

FORMATS: dict[str, PromptFormat] = {format.name: format for format in _FORMATS}
"""The prompt formats by name. WizardLM 13B and 70B use Vicuna's, 7B its own."""


@checked(PromptError)
def get_format(
    name: str,
    tokenizer: Tokenizer | None = None,
    *,
    now: datetime.datetime | None = None,
) -> PromptFormat:
    """Return a prompt format by name.

    Args:
      name: a key of `FORMATS`; `template` for the chat template of the checkpoint, or
        `template:NAME` for another of its templates.
      tokenizer: of the checkpoint, for its templates.
      now: the time that a template sees; None is the time of each call.

    Raises:
      PromptError: there is no such format; the message lists all.

    >>> import llama_jax
    >>> tokenizer = llama_jax.load().tokenizer
    >>> dialog = [{"role": "user", "content": "Hi"}]
    >>> ids = llama_jax.get_format("llama2-chat").encode(tokenizer, dialog)
    >>> tokenizer.decode(ids)
    '[INST] Hi [/INST]'
    """
    if is_template(name):
        if tokenizer is None:
            raise PromptError(f"prompt format: {name} needs the checkpoint's tokenizer")
        return template_format(tokenizer, name, now=now)
    if name not in FORMATS:
        raise unknown_format(name, (*FORMATS, TEMPLATE))
    return FORMATS[name]


def unknown_format(name: str, names: Sequence[str]) -> PromptError:
    """The error for a format that is none of `names`."""
    return PromptError(
        f"prompt format: {name!r} does not exist; choose from {', '.join(names)}"
        + did_you_mean(name, names)
    )


def default_format(tokenizer: Tokenizer) -> PromptFormat:
    """Return the format of a checkpoint's chats.

    It is the checkpoint's own chat template. Without one, it is the format of Meta's
    chat model that has this tokenizer.

    Raises:
      PromptError: the template is not valid.
    """
    if DEFAULT in tokenizer.settings.chat_templates:
        return template_format(tokenizer)
    if tokenizer.piece_id("<|start_header_id|>") is not None:
        return FORMATS["llama3"]
    if tokenizer.step_id is not None:
        return FORMATS["codellama-70b-instruct"]
    if tokenizer.infilling is not None:
        return FORMATS["codellama-instruct"]
    return FORMATS["llama2-chat"]


@checked(PromptError)
def completion_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text to be continued, with the begin of sequence if the model has one.

    >>> import llama_jax
    >>> tokenizer = llama_jax.load().tokenizer
    >>> ids = llama_jax.completion_prompt(tokenizer, "Once upon a time")
    >>> ids[0] == tokenizer.bos_id, tokenizer.decode(ids)
    (True, 'Once upon a time')
    """
    settings = tokenizer.settings
    return tokenizer.encode(text, bos=settings.add_bos, eos=settings.add_eos)


@checked(PromptError)
def infilling_prompt(
    tokenizer: Tokenizer, prefix: str, suffix: str, *, suffix_first: bool = False
) -> list[int]:
    """Encode a prefix and a suffix for a model that writes the text between them.

    Rozière et al., "Code Llama", arXiv:2308.12950, section 2.3.

    Args:
      tokenizer: with infilling pieces (Code Llama 7B and 13B, except Python).
      prefix: text before the gap.
      suffix: text after the gap.
      suffix_first: put the suffix first (SPM instead of PSM), the order of half of
        Code Llama's training examples.

    Raises:
      PromptError: the tokenizer has no infilling pieces.

    >>> import llama_jax
    >>> pieces = {2048: "▁<PRE>", 2049: "▁<SUF>", 2050: "▁<MID>", 2051: "▁<EOT>"}
    >>> added = {id: llama_jax.AddedToken(text) for id, text in pieces.items()}
    >>> tokenizer = llama_jax.load().tokenizer.replace_settings(added_tokens=added)
    >>> ids = llama_jax.infilling_prompt(tokenizer, "Once", "a time")
    >>> [pieces[id] for id in ids if id in pieces]
    ['▁<PRE>', '▁<SUF>', '▁<MID>']
    """
    pieces = tokenizer.infilling
    if pieces is None:
        raise PromptError(
            "infilling: the tokenizer has no infilling pieces; use Code Llama 7B or "
            "13B, base or Instruct"
        )
    before = tokenizer.encode(prefix, bos=False, eos=False)
    after = [pieces.suffix, *tokenizer.encode_infilling(suffix)]
    if suffix_first:
        body = [*after, pieces.middle, *before]
    else:
        body = [*before, *after, pieces.middle]
    begin = tokenizer.encode("", bos=tokenizer.settings.add_bos, eos=False)
    return [*begin, pieces.prefix, *body]
