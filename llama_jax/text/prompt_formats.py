"""Chat, instruction and infilling formats: pure functions from text to token ids.

Each `PromptFormat` writes a dialog the way one family of models was trained on it,
either up to where the assistant answers (`encode`) or in pieces that say which tokens
are answers (`spans`, for training).
"""

import difflib
import re
from collections.abc import Iterator

from llama_jax.errors import PromptError
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
"""What Meta's chat code answers to a prompt that raises `UnsafePromptError` here."""


def _turn(
    tokenizer: Tokenizer, prompt: str, answer: str | None, *, bos: bool = True
) -> Iterator[Span]:
    """A prompt, with an answer and the end of sequence if there is one.

    The answer is encoded as the model would continue the prompt's tokens. Where it
    begins with a space that is how both would be encoded as one text.
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
        written = None if answer is None else f" {answer.strip()} "
        yield from _turn(tokenizer, f"[INST] {user.strip()} [/INST]", written)


def _write_codellama_70b(tokenizer: Tokenizer, dialog: Dialog) -> Iterator[Span]:
    step = _special(tokenizer, "codellama-70b-instruct", "<step>")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, bos=False, eos=False)

    last = dialog[-1] if dialog[-1]["role"] == "assistant" else None
    given = [*dialog] if last is None else [*dialog[:-1]]
    if given[0]["role"] != "system":
        given.insert(0, {"role": "system", "content": ""})
    yield Span([tokenizer.bos_id], False)
    for message in given:
        header = f" Source: {message['role']}"
        if "destination" in message:
            header += f"\nDestination: {message['destination'].strip()}"
        yield Span(encode(header), False)
        is_answer = message["role"] == "assistant"
        if content := message["content"].strip():
            yield Span(encode("\n\n"), False)
            yield Span(tokenizer.encode_infilling(f" {content}"), is_answer)
        yield Span([step], is_answer)
    # The last answer is written as the model writes it, behind the prompt's space;
    # those before it as Meta's code encodes a history.
    to = "user" if last is None else last.get("destination", "user").strip()
    yield Span(encode(f" Source: assistant\nDestination: {to}"), False)
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
        written = None if answer is None else f" {answer}"
        yield from _turn(tokenizer, prompt, written, bos=i == 0)


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
    """Ids of `text`, whose tags are tokens where the tokenizer has them, else text."""
    ids = [tokenizer.bos_id] if bos else []
    parts = re.split("(" + "|".join(map(re.escape, _CHATML_TAGS)) + ")", text)
    if None in map(tokenizer.piece_id, _CHATML_TAGS):
        parts = [text]
    for i, part in enumerate(parts):
        if (tag := tokenizer.piece_id(part)) is not None and part in _CHATML_TAGS:
            ids.append(tag)
        elif bos and i == 0:
            ids += tokenizer.encode(part, bos=False, eos=False)
        else:  # inside a text there is no space to add in front
            ids += tokenizer.encode_infilling(part)
    return ids


# Text cannot spell Llama 3's special tokens, so no text is unsafe.
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
    """Id of a token that a format is made of."""
    id = tokenizer.piece_id(piece)
    if id is None:
        raise PromptError(f"{format}: the tokenizer has no piece {piece}")
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
        # Its models sometimes go on with an exercise of their own instead of ending.
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
"""The prompt formats by name. WizardLM 13B and 70B speak Vicuna's, 7B its own."""


def get_format(name: str) -> PromptFormat:
    """The format called `name`, or a `PromptError` that lists them."""
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, n=1)
        raise PromptError(
            f"no prompt format is called {name!r}; "
            + (f"did you mean {close[0]!r}? " if close else "")
            + f"There are: {', '.join(FORMATS)}"
        )
    return FORMATS[name]


def default_format(tokenizer: Tokenizer) -> PromptFormat:
    """What Meta's chat models speak, as far as the tokenizer tells them apart."""
    if tokenizer.piece_id("<|start_header_id|>") is not None:
        return FORMATS["llama3"]
    if tokenizer.step_id is not None:
        return FORMATS["codellama-70b-instruct"]
    if tokenizer.infilling is not None:
        return FORMATS["codellama-instruct"]
    return FORMATS["llama2-chat"]


def completion_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Prompt ids for continuing `text`."""
    return tokenizer.encode(text, bos=True, eos=False)


def infilling_prompt(
    tokenizer: Tokenizer, prefix: str, suffix: str, *, suffix_first: bool = False
) -> list[int]:
    """Prompt ids for what belongs between `prefix` and `suffix`.

    Args:
      tokenizer: one with infilling pieces (Code Llama 7B and 13B, not Python).
      prefix: text in front of the gap.
      suffix: text behind it.
      suffix_first: show the suffix first, the order of half of Code Llama's training
        examples (Code Llama paper, section 2.3).

    Raises:
      PromptError: the tokenizer is not that of an infilling model.
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
    return [tokenizer.bos_id, pieces.prefix, *body]
