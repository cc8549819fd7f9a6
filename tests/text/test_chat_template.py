"""Chat templates of checkpoints: prompts, learnt spans, errors, and the sandbox."""

import datetime
from typing import Any

import pytest
import tokenizers
from support.chat_templates import FAMILIES, Family
from support.huggingface_tokenizers import small_model, their_tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from llama_jax.errors import PromptError, UnsafePromptError
from llama_jax.generation.request import chat_request
from llama_jax.text import template_sandbox
from llama_jax.text.dialogs import Message, PromptFormat
from llama_jax.text.prompt_formats import default_format, get_format
from llama_jax.text.settings import AddedToken
from llama_jax.text.template_sandbox import compile_template, render
from llama_jax.text.tokenizer import Tokenizer

NOW = datetime.datetime(2024, 7, 26, 12, 30)


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


def system(content: str) -> Message:
    return Message(role="system", content=content)


SHORT = [user("Hi")]
LONG = [
    system("Be  brief."),
    user("once upon\n\n a time?"),
    assistant("the sun, ünder"),
    user("<b>Bye</b> "),
]
DIALOGS = (SHORT, LONG, LONG[1:], [*LONG, assistant(" the sea"), user("the\tend")])


def added(family: Family) -> dict[int, AddedToken]:
    return {320 + i: AddedToken(text) for i, text in enumerate(family.special)}


def tokenizer_of(template: str | Family, *special: str, eos: str = "</s>") -> Tokenizer:
    """A small SentencePiece tokenizer with a chat template."""
    family = template
    if isinstance(family, str):
        family = Family(family, special, eos)
    tokenizer = Tokenizer(small_model()).replace_settings(added_tokens=added(family))
    return tokenizer.replace_settings(
        eos_id=tokenizer.piece_id(family.eos),
        chat_templates={"default": family.template},
    )


def format_of(name: str) -> tuple[Tokenizer, PromptFormat]:
    tokenizer = tokenizer_of(FAMILIES[name])
    return tokenizer, get_format("template", tokenizer, now=NOW)


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    return "".join(
        piece if piece in tokenizer.special_texts else piece.replace("▁", " ")
        for piece in map(tokenizer.piece, ids)
    )


# Prompts

TEXTS = {
    "zephyr": "<|system|>\nB</s>\n<|user|>\nHi</s>\n<|assistant|>\nYes</s>\n<|user|>\n"
    "Bye</s>\n<|assistant|>\n",
    "chatml": "<|im_start|>system\nB<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama2-chat": "<s>[INST] <<SYS>>\nB\n<</SYS>>\n\nHi [/INST] Yes </s>"
    "<s>[INST] Bye [/INST]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nB"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "Yes<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "vicuna": "B USER: Hi ASSISTANT: Yes</s>USER: Bye ASSISTANT:",
    "mistral": "<s>[INST] Hi[/INST] Yes</s>[INST] B\n\nBye[/INST]",
    "alpaca": "B\n\n### Instruction:\nHi\n\n### Response:\nYes</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "deepseek": "<s>B\n\nUser: Hi\n\nAssistant: Yes<｜end▁of▁sentence｜>User: Bye\n\n"
    "Assistant:",
}
TEXTS["orca2"] = "<s>" + TEXTS["chatml"]
TEXTS["marked"] = TEXTS["smollm2"] = TEXTS["chatml"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_writes_its_familys_prompt(name: str) -> None:
    tokenizer, format = format_of(name)
    dialog = [system("B"), user("Hi"), assistant("Yes"), user("Bye")]
    ids = format.encode(tokenizer, dialog)
    assert ids == tokenizer.encode_marked(TEXTS[name])
    assert set(map(tokenizer.piece, ids)) >= set(FAMILIES[name].special) & {
        "<|im_end|>"
    }


def byte_level(family: Family) -> tuple[Any, Tokenizer]:
    """A byte-level tokenizer of the package `tokenizers`, and ours."""
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<unk>", *family.special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(["once upon a time in the sun\n\n"] * 9, trainer)
    ours = Tokenizer(theirs.to_str().encode())
    return theirs, ours.replace_settings(bos_id=0, unk_id=2)


def sentencepiece(family: Family) -> tuple[Any, Tokenizer]:
    theirs = their_tokenizer(small_model(), added(family), "always")
    return theirs, tokenizer_of(family)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [sentencepiece, byte_level])
@pytest.mark.parametrize("name", FAMILIES)
def test_texts_and_ids_equal_those_of_transformers(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: Any
) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:  # type: ignore[override]
            return NOW

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    family = FAMILIES[name]
    theirs, tokenizer = kind(family)
    tokenizer = tokenizer.replace_settings(
        eos_id=tokenizer.piece_id(family.eos),
        chat_templates={"default": family.template},
    )
    format = get_format("template", tokenizer, now=NOW)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=theirs, bos_token="<s>", eos_token=family.eos,
        unk_token="<unk>",
    )  # fmt: skip
    theirs.chat_template = family.template
    for dialog in [LONG[1:], SHORT] if name == "mistral" else DIALOGS:
        prompt = theirs.apply_chat_template(
            dialog, add_generation_prompt=True, return_dict=False
        )
        assert format.encode(tokenizer, dialog) == prompt
        whole = [*dialog, assistant("An answer.")]
        learnt = theirs.apply_chat_template(
            whole, return_dict=True, return_assistant_tokens_mask=name == "marked"
        )
        spans = format.spans(tokenizer, whole)
        ids = [id for span in spans for id in span.ids]
        assert ids == learnt["input_ids"][: len(ids)]
        assert not tokenizer.decode(learnt["input_ids"][len(ids) :]).strip()
        if name == "marked":
            mask = [span.is_answer for span in spans for _ in span.ids]
            assert mask == list(map(bool, learnt["assistant_masks"][: len(mask)]))


# Learnt spans

ANSWERS = {
    "zephyr": ["the sun</s>", "once</s>"],
    "llama2-chat": [" the sun </s>", " once </s>"],
    "vicuna": [" the sun</s>", " once</s>"],
    "mistral": ["  the sun</s>", "  once</s>"],  # a space after [/INST]
    "deepseek": [" the sun<｜end▁of▁sentence｜>", " once<｜end▁of▁sentence｜>"],
    "llama3": ["the sun<|eot_id|>", "once<|eot_id|>"],
    "alpaca": ["the sun</s>", "once</s>"],
} | {
    name: ["the sun<|im_end|>", "once<|im_end|>"]
    for name in ("chatml", "smollm2", "orca2", "marked")
}


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_learnt_with_the_token_that_ends_them(name: str) -> None:
    tokenizer, format = format_of(name)
    dialog = [user("Hi"), assistant("the sun"), user("Bye"), assistant("once")]
    spans = format.spans(tokenizer, dialog)
    answers = [spelled(tokenizer, span.ids) for span in spans if span.is_answer]
    assert answers == ANSWERS[name]
    assert spans[-1].is_answer
    # What precedes an answer is what inference reads.
    before = [id for span in spans[:-1] for id in span.ids]
    assert before == format.encode(tokenizer, dialog[:-1])


def test_the_token_after_an_answer_ends_a_completion() -> None:
    # Orca 2's end of sequence is </s>, but its answers end with <|im_end|>.
    tokenizer = tokenizer_of(FAMILIES["orca2"])
    request = chat_request(tokenizer, SHORT)
    assert [*map(tokenizer.piece, request.stop_ids)] == ["<|im_end|>", "</s>"]
    for template in ("{{ bos_token }}{{ messages[0].content }}", "{{ messages[9].x }}"):
        assert default_format(tokenizer_of(template)).stop_ids(tokenizer) == (2,)


MARKS = """\
{% for m in messages %}{% if m.role == 'user' %}{{ m.content }};{% else %}\
{% generation %}{{ m.content if loop.last else '...' }}{% endgeneration %}\
{% endif %}{% endfor %}"""


def test_a_dialog_that_a_template_rewrites_is_learnt_only_with_marks() -> None:
    # Mistral's template moves the system message to the last user message.
    tokenizer, format = format_of("mistral")
    dialog = [system("a"), user("b"), assistant("c"), user("d"), assistant("e")]
    with pytest.raises(PromptError, match=r"message 3 of 5 .* another way"):
        format.spans(tokenizer, dialog)
    assert len(format.spans(tokenizer, dialog[1:3])) == 2
    assert format.encode(tokenizer, dialog[:4])
    tokenizer = tokenizer_of(MARKS)
    spans = default_format(tokenizer).spans(tokenizer, dialog[1:])
    assert [span.is_answer for span in spans] == [False, True, False, True]


def test_generation_tags_whose_text_is_edited_are_refused() -> None:
    template = (
        "{% set x %}{% generation %} {{ messages[-1].content }} {% endgeneration %}"
        "{% endset %}{{ x | trim }}"
    )
    tokenizer = tokenizer_of(template)
    with pytest.raises(PromptError, match="edits the text of its generation tags"):
        default_format(tokenizer).spans(tokenizer, [user("a"), assistant("b")])


# Which template

TWO = {"default": "D{{ messages[0].content }}", "tool_use": "T", "bad": "\n{% if %}"}


def test_formats_name_the_templates_of_the_checkpoint() -> None:
    tokenizer = Tokenizer(small_model()).replace_settings(chat_templates=TWO)
    assert default_format(tokenizer).name == "template"
    tool = get_format("template:tool_use", tokenizer)
    assert tool.encode(tokenizer, SHORT) == tokenizer.encode_marked("T")
    assert chat_request(tokenizer, SHORT).prompt_ids == tuple(
        tokenizer.encode_marked("DHi")
    )
    for name, words in (
        ("template:no", "choose from default, tool_use, bad"),
        ("template:bad", r"not valid, line 2: Expected an expression"),
        ("tmplate", "did you mean 'template'"),
    ):
        with pytest.raises(PromptError, match=words):
            get_format(name, tokenizer)
    with pytest.raises(PromptError, match="needs the checkpoint's tokenizer"):
        get_format("template")
    plain = Tokenizer(small_model())
    assert default_format(plain).name == "llama2-chat"
    with pytest.raises(PromptError, match="choose another --format"):
        get_format("template", plain)


def test_settings_identify_the_template_and_its_date() -> None:
    settings = [dict(format_of(name)[1].settings) for name in ("llama3", "chatml")]
    assert settings[0]["date"] == "2024-07-26T12:30:00"
    assert settings[1].keys() == {"template"}
    assert settings[0]["template"] != settings[1]["template"]


# Errors


def test_special_tokens_in_a_message_are_refused() -> None:
    tokenizer, format = format_of("orca2")
    for text in ("<|im_end|>", "a</s>b", "<s>", "<unk>"):
        dialog = [*LONG[:3], user(text)]
        with pytest.raises(UnsafePromptError, match=r"message 4 of 4 .* special tag"):
            format.encode(tokenizer, dialog)
        assert format.encode(tokenizer, dialog, allow_tags=True)
    assert format.encode(tokenizer, [user("[INST] <|im_middle|>")])


def test_words_that_a_template_writes_as_tags_are_refused_and_end_answers() -> None:
    words = ("<|im_start|>", "<|im_end|>", "<think>", "assistant")
    added = {320 + i: AddedToken(word, special=False) for i, word in enumerate(words)}
    tokenizer = Tokenizer(small_model()).replace_settings(
        added_tokens=added, chat_templates={"default": FAMILIES["chatml"].template}
    )
    format = default_format(tokenizer)
    assert format.stop_ids(tokenizer) == (321, 2)
    with pytest.raises(UnsafePromptError, match="special tag"):
        format.encode(tokenizer, [user("a<|im_end|>")])
    ids = format.encode(tokenizer, [user("my assistant <think>")])
    assert [id for id in ids if id >= 320] == [320, 323, 322, 321, 320, 323]


def test_a_template_that_raises_names_the_message() -> None:
    tokenizer, format = format_of("llama2-chat")
    dialog = [user("a"), assistant("b"), assistant("c"), user("d")]
    with pytest.raises(
        PromptError,
        match=r"template: message 3 of 4 \(role 'assistant'\) is refused by the "
        r"template: Roles must alternate user/assistant/user/assistant/\.\.\.$",
    ):
        format.encode(tokenizer, dialog)


@pytest.mark.parametrize(
    ("dialog", "words"),
    [
        ([], "no user message"),
        ([user("a"), assistant("b")], "must be the user's"),
        ([{"role": "tool", "content": "a"}], "must be the system's or user's or"),
        ([{"role": "user", "content": "a", "input": "b"}], "has the key 'input'"),
        ([{"role": "user"}], "no text as its 'content'"),
    ],
)
@pytest.mark.wrong_types
def test_dialogs_that_no_template_can_answer_are_refused(
    dialog: Any, words: str
) -> None:
    tokenizer, format = format_of("chatml")
    with pytest.raises(PromptError, match=words):
        format.encode(tokenizer, dialog)


# The sandbox

BIG = "{% set x = 'a' * 10000 %}"
DOUBLING = (
    "{%% set ns = namespace(x='a') %%}{%% for i in range(99) %%}"
    "{%% set ns.x = ns.x %s ns.x %%}{%% endfor %%}"
)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ (''|attr('__class__')).x }}",
        "{{ ('{0.__class__.__mro__}'|attr('format'))('').x }}",
        "{{ '{0.__class__.__mro__.x}'.format('') }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__self__.x }}",
        "{{ self._TemplateReference__context.x }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ dict.mro() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='assistant') }}",
        "{{ namespace(__call__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ open('/etc/passwd') }}",
    ],
)
def test_a_hostile_template_reaches_no_attribute_and_no_file(template: str) -> None:
    with pytest.raises(PromptError):
        render(compile_template(template), {"messages": [user("Hi")]})


@pytest.mark.parametrize(
    "template",
    [
        "{{ 10 ** 1000000000 }}",
        "{% set ns = namespace(x=3) %}{% for i in range(99) %}"
        "{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{{ 1 | round(1000000000) }}",
        "{{ range(1000000000) | list }}",
        "{{ 'a' * 1000000000 }}",
        "{{ [1] * 1000000000 }}",
        BIG + "{{ [[[x] * 1000] * 1000] * 1000 }}",
        BIG + "{{ [[[x] * 1000] * 1000] * 1000 ~ '' }}",
        DOUBLING % "+",
        DOUBLING % "~",
        BIG + "{{ x.replace('a', x) }}",
        BIG + "{{ x | replace('a', x) }}",
        BIG + "{{ x.join(x) }}",
        BIG + "{{ x.translate({97: x}) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ 'a'.center(1000000000) }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ messages | tojson(indent=1000000000) }}",
        "{{ messages | batch(1000000000, 0) | list }}",
        "{% macro f(n) %}x{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% for k in "
        "'abcdefghijklmnopqrstuvwxyz' * 1000 %}abc{% endfor %}{% endfor %}{% endfor %}",
    ],
)
def test_what_a_hostile_template_builds_is_bounded(
    monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SIZE", 1 << 20)
    with pytest.raises(PromptError):
        render(compile_template(template), {"messages": [user("Hi")]})


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SIZE", 1 << 20)
    template = "{% for i in range(1000) %}{{ x }}{% endfor %}"
    with pytest.raises(PromptError, match="builds more than"):
        render(compile_template(template), {"x": "a" * 1100})


def test_long_dialogs_are_within_the_bounds() -> None:
    tokenizer, format = format_of("alpaca")
    dialog = [user("a" * 2000), assistant("b" * 2000)] * 50
    assert len(format.encode(tokenizer, [*dialog, user("c")])) > 100_000


def test_the_environment_is_that_of_transformers() -> None:
    template = """\
  {% for x in range(5) %}
    {% if x == 1 %}{% continue %}{% endif %}
    {% if x == 3 %}{% break %}{% endif %}
{{ x }}
  {% endfor %}
{{ {"b": "<é>", "a": [1]} | tojson }}{{ {"b": 1, "a": 2} | tojson(indent=1) }}
{{- {"b": 1, "a": 2} | tojson(sort_keys=true, separators=(",", ":")) }}
{%- generation %}x{% endgeneration %}{{ none }}{{ missing }}
"""
    assert render(compile_template(template), {}, marks=("(", ")")) == (
        '0\n2\n{"b": "<é>", "a": [1]}{\n "b": 1,\n "a": 2\n}{"a":2,"b":1}(x)None'
    )


def test_errors_name_the_line() -> None:
    with pytest.raises(PromptError, match=r"^line 3: 'x' is undefined"):
        render(compile_template("a\n\n{{ x.y }}"), {})
    with pytest.raises(PromptError, match=r"^line 2: Encountered unknown tag 'nope'"):
        compile_template("a\n{% nope %}")
