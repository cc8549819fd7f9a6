"""A checkpoint's own chat template as a prompt format.

Renders the Jinja templates of `TextSettings.chat_templates` as `transformers` does, for
prompts and, with the answers apart from their context, for training.
"""

import dataclasses
import datetime
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator

from llama_jax.errors import PromptError
from llama_jax.text.dialogs import (
    Dialog,
    Message,
    PromptFormat,
    Span,
    message_error,
)
from llama_jax.text.tokenizer import Tokenizer

TEMPLATE = "template"
"""Name of the format; `template:NAME` is another template of the checkpoint."""

DEFAULT = "default"
"""Name of the template of a plain chat."""


def is_template(format: str) -> bool:
    """Whether a format's name is that of a template."""
    return format.partition(":")[0] == TEMPLATE


def template_format(
    tokenizer: Tokenizer,
    name: str = TEMPLATE,
    *,
    now: datetime.datetime | None = None,
) -> PromptFormat:
    """Make the prompt format of a checkpoint's chat template.

    An answer ends with the tokenizer's `end_ids`, and with the special token that the
    template writes directly after an answer.

    Args:
      tokenizer: of the checkpoint.
      name: `template`, or `template:NAME`.
      now: the time that the template sees; None is the time of each call.

    Raises:
      PromptError: there is no such template, or it has a syntax error.
    """
    from llama_jax.text import template_sandbox  # imports Jinja

    templates = tokenizer.settings.chat_templates
    key = name.partition(":")[2] or DEFAULT
    if key not in templates:
        names = ", ".join(templates)
        raise PromptError(
            f"{name}: the checkpoint has no chat template of this name; "
            + (f"choose from {names}" if names else "choose another --format")
        )
    try:
        compiled = template_sandbox.compile_template(templates[key])
    except PromptError as error:
        raise PromptError(
            f"{name}: the checkpoint's chat template is not valid, {error}; correct it "
            "or choose another --format"
        ) from error
    render = functools.partial(template_sandbox.render, compiled)
    template = _ChatTemplate(name, templates[key], render, tokenizer, now)
    settings = {"template": hashlib.sha256(templates[key].encode()).hexdigest()[:16]}
    if now is not None and "strftime_now" in templates[key]:
        settings["date"] = now.isoformat()
    return PromptFormat(
        name=name,
        write=lambda _, dialog: template.spans(dialog),
        write_prompt=lambda _, dialog: template.prompt(dialog),
        tags=template.control_tokens,
        stop_tokens=template.end_tokens,
        alternate=False,
        settings=settings,
    )


# Around the text of `generation` tags; Unicode reserves them for such internal use.
_MARKS = ("\ufdd0", "\ufdd1")


@dataclasses.dataclass(frozen=True)
class _ChatTemplate:
    """A template, and what it needs to write token ids.

    Attributes:
      name: of the format, for errors.
      source: its Jinja.
      render: renders it with variables, and with `marks` around answers.
      tokenizer: encodes what it writes.
      now: the time that it sees; None is the current time.
    """

    name: str
    source: str
    render: Callable[..., str]
    tokenizer: Tokenizer
    now: datetime.datetime | None

    def prompt(self, dialog: Dialog) -> list[int]:
        """Encode a dialog as a prompt."""
        return self.tokenizer.encode_marked(self.text(dialog, prompt=True))

    def spans(self, dialog: Dialog) -> Iterator[Span]:
        """Encode a dialog, its answers apart from their context."""
        text = self.text(dialog, prompt=dialog[-1]["role"] != "assistant")
        marked = self.marked_answers(dialog, text)
        ids, done = self.tokenizer.encode_marked(text), 0
        for start, end in marked or self.answers(dialog, text):
            first = max(done, self.count_ids(ids, text, start))
            last = max(first, self.count_ids(ids, text, end))
            if not marked:
                last = self.end_of_answer(ids, first, last)
            yield Span(ids[done:first], False)
            yield Span(ids[first:last], True)
            done = last
        if dialog[-1]["role"] != "assistant":  # otherwise the answer ends the dialog
            yield Span(ids[done:], False)

    def marked_answers(self, dialog: Dialog, text: str) -> list[tuple[int, int]]:
        """The slices of the text that are in `generation` tags of the template."""
        if any(mark in text for mark in _MARKS):
            raise PromptError(
                f"{self.name}: U+FDD0 and U+FDD1 are no text; remove them"
            )
        prompt = dialog[-1]["role"] != "assistant"
        marked = self.text(dialog, prompt=prompt, marks=_MARKS)
        parts = re.split("[" + "".join(_MARKS) + "]", marked)
        if "".join(parts) != text or len(parts) % 2 == 0:
            raise PromptError(
                f"{self.name}: the template edits the text of its generation tags, so "
                "answers cannot be located; choose another --format"
            )
        cuts = list(itertools.accumulate(map(len, parts)))[:-1]
        return list(zip(cuts[::2], cuts[1::2], strict=True))

    def answers(self, dialog: Dialog, text: str) -> Iterator[tuple[int, int]]:
        """The slices of the text that answers add to the prompts before them."""
        for i, message in enumerate(dialog):
            if message["role"] != "assistant":
                continue
            if i == 0:
                raise message_error(self.name, dialog, i, "has no prompt before it")
            before = self.text(dialog[:i], prompt=True)
            after = text
            if i + 1 < len(dialog):
                after = self.text(dialog[: i + 1], prompt=False)
            if not (after.startswith(before) and text.startswith(after)):
                raise message_error(
                    self.name, dialog, i,
                    "is written in another way at the end of a dialog than within it, "
                    "so it cannot be learnt; choose another --format, or mark answers "
                    "in the template with {% generation %}",
                )  # fmt: skip
            yield len(before), len(after)

    def count_ids(self, ids: list[int], text: str, end: int) -> int:
        """The number of ids before a character, without one that continues after it."""
        if end == len(text):
            return len(ids)
        before = self.tokenizer.encode_marked(text[:end])
        pairs = enumerate(zip(before, ids, strict=False))
        return next((i for i, (a, b) in pairs if a != b), len(before))

    def end_of_answer(self, ids: list[int], first: int, last: int) -> int:
        """The end of an answer: after the first id that ends a completion."""
        ends = {*map(self.tokenizer.piece_id, self.end_tokens)}
        ends |= {*self.tokenizer.end_ids}
        return next((i + 1 for i in range(first, last) if ids[i] in ends), last)

    @functools.cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """The texts that no message may contain.

        They are the special tokens, and added words such as `<|im_end|>` that the
        template writes as if they were special.
        """
        words = [
            token.text
            for token in self.tokenizer.settings.added_tokens.values()
            if re.fullmatch(r"[<\[].+[>\]]", token.text) and token.text in self.source
        ]
        return tuple(dict.fromkeys((*self.tokenizer.special_texts, *words)))

    @functools.cached_property
    def end_tokens(self) -> tuple[str, ...]:
        """The token that the template writes directly after an answer, if it does."""
        answer = "An answer"
        dialog = [
            Message(role="user", content="Hello"),
            Message(role="assistant", content=answer),
        ]
        try:
            text = self.text(dialog, prompt=False)
        except PromptError:
            return ()
        _, found, rest = text.rpartition(answer)
        special = self.special_tokens()
        no_ends = (special.get("bos_token"), special.get("unk_token"))
        tokens = [
            token
            for token in self.control_tokens
            if found and rest.lstrip().startswith(token) and token not in no_ends
        ]
        return (max(tokens, key=len),) if tokens else ()

    def special_tokens(self) -> dict[str, str]:
        """The names of special tokens, as templates name them."""
        ids = {
            f"{name}_token": getattr(self.tokenizer, f"{name}_id")
            for name in ("bos", "eos", "unk", "pad")
        }
        return {n: self.tokenizer.piece(id) for n, id in ids.items() if id >= 0}

    def variables(self, dialog: Dialog, *, prompt: bool) -> dict[str, object]:
        """The variables of a template."""
        now = self.now or datetime.datetime.now()
        return {
            **self.special_tokens(),
            "messages": [dict(message) for message in dialog],
            "add_generation_prompt": prompt,
            "tools": None,
            "documents": None,
            "strftime_now": now.strftime,
        }

    def text(
        self, dialog: Dialog, *, prompt: bool, marks: tuple[str, str] = ("", "")
    ) -> str:
        """Render a dialog.

        Args:
          dialog: its messages.
          prompt: whether the beginning of an answer follows.
          marks: texts to put around answers in `generation` tags.

        Raises:
          PromptError: the template refuses a message or fails.
        """
        try:
            return self.render(self.variables(dialog, prompt=prompt), marks=marks)
        except PromptError as error:
            # Its message is the first with which it fails for this reason.
            last = len(dialog)
            while last > 1:
                if self.reason(dialog[: last - 1], prompt=prompt) != str(error):
                    break
                last -= 1
            problem = f"is refused by the template: {error}"
            raise message_error(self.name, dialog, last - 1, problem) from error

    def reason(self, dialog: Dialog, *, prompt: bool) -> str:
        """Why rendering fails, "" if it does not."""
        try:
            self.render(self.variables(dialog, prompt=prompt))
        except PromptError as error:
            return str(error)
        return ""
