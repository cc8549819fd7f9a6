"""Formats of training: prompts as in inference, answers learnt, texts whole."""

import datetime
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.data.encode import DATA_FORMATS, Encoder
from llama_jax.data.files import Location
from llama_jax.data.infilling import Cut, cut, encode_cut
from llama_jax.data.loader import Loader
from llama_jax.data.records import Content, Dialog, Pair, Record
from llama_jax.errors import DataError, PromptError
from llama_jax.loading import bundled
from llama_jax.text.dialogs import Message
from llama_jax.text.prompt_formats import FORMATS, get_format, infilling_prompt
from llama_jax.text.tokenizer import Tokenizer
from tests.support.tokenizers import special_tokens

LOCATION = Location("a.jsonl", "line", 7)
SINGLE_TURN = ("alpaca", "wizardlm-7b")
TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    """The bundled tokenizer, with names for ids of every format and of infilling."""
    plain = Tokenizer.from_file(bundled() / "tokenizer.model")
    names = (
        "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "<step>", "<|start_header_id|>",
        "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
    )  # fmt: skip
    added = dict(enumerate(names, start=plain.vocab_size))
    return Tokenizer(plain.contents, settings=special_tokens(added))


def dialog(*texts: str, system: str | None = None) -> Dialog:
    messages = [] if system is None else [Message(role="system", content=system)]
    for i, text in enumerate(texts):
        role: Any = "assistant" if i % 2 else "user"
        messages.append(Message(role=role, content=text))
    return Dialog(messages)


def encode(
    tokenizer: Tokenizer, content: Content, format: str, length: int = 4096, **more: Any
) -> list[tuple[list[int], list[bool]]]:
    encoder = Encoder(tokenizer=tokenizer, format=format, length=length, **more)
    found = encoder.encode(Record(LOCATION, content), 0, 0).examples
    return [(example.ids.tolist(), example.mask.tolist()) for example in found]


def learnt(ids: Sequence[int], mask: Sequence[bool]) -> list[list[int]]:
    """The runs of ids that are learnt."""
    runs: list[list[int]] = [[]]
    for id, is_learnt in zip(ids, mask, strict=True):
        if is_learnt:
            runs[-1].append(id)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


@pytest.mark.parametrize("format", FORMATS)
def test_training_prompts_equal_those_of_inference(
    small: Tokenizer, format: str
) -> None:
    content = dialog("Who are you?", "A model.", "Sure?", "Yes.")
    if format in SINGLE_TURN:
        content = dialog("Who are you?", "A model.")
    ((ids, mask),) = encode(small, content, format)
    prompt = FORMATS[format].encode(small, content.messages[:-1])
    assert ids[: len(prompt)] == prompt
    last = learnt(ids, mask)[-1]
    assert ids[len(prompt) :] == last
    assert last[-1] in FORMATS[format].stop_ids(small)
    answer = content.messages[-1]["content"]
    assert small.decode(last[:-1]).strip() == answer


def test_llama2_pairs_have_their_own_begin_and_end_and_answers_are_learnt(
    llama2_tokenizer: Tokenizer,
) -> None:
    t = llama2_tokenizer
    ((ids, mask),) = encode(
        t, dialog("Hi", "Hello", "Bye", " Ciao ", system="Be kind."), "llama2-chat"
    )
    pairs = [
        ("[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]", " Hello "),
        ("[INST] Bye [/INST]", " Ciao "),
    ]
    expected = [t.encode(p + a, bos=True, eos=True) for p, a in pairs]
    assert ids == [id for pair in expected for id in pair]
    answers = [[*t.encode_infilling(a), t.eos_id] for _, a in pairs]
    assert learnt(ids, mask) == answers


@given(texts=st.lists(TEXT, min_size=2, max_size=6))
def test_all_answers_and_nothing_else_are_learnt(
    small: Tokenizer, texts: list[str]
) -> None:
    content = dialog(*texts)
    answers = [
        [*small.encode_infilling(f" {text}"), small.eos_id]
        for text in texts[1::2]
        if text.strip()  # the end of an empty answer is not learnt either
    ]
    if not answers:
        with pytest.raises(DataError, match="no answer to learn from"):
            encode(small, content, "vicuna")
        return
    ((ids, mask),) = encode(small, content, "vicuna")
    assert learnt(ids, mask) == answers
    assert not mask[0]
    # What the user said last is not there without an answer.
    assert mask[-1] == bool(texts[1::2][-1].strip())


@given(prompt=TEXT, response=TEXT.filter(str.strip))
def test_a_plain_pair_is_prompt_response_and_end(
    small: Tokenizer, prompt: str, response: str
) -> None:
    ((ids, mask),) = encode(small, Pair(prompt, response), "text")
    given = small.encode(prompt, bos=True, eos=False)
    assert ids == [*given, *small.encode_infilling(response), small.eos_id]
    assert mask == [False] * len(given) + [True] * (len(ids) - len(given))


def test_a_pair_is_a_dialog_to_a_chat_format(small: Tokenizer) -> None:
    for format in ("llama2-chat", "alpaca"):
        pair = encode(small, Pair("Hi", "Hello"), format)
        assert pair == encode(small, dialog("Hi", "Hello"), format)


@pytest.mark.parametrize("format", [f for f in FORMATS if f not in SINGLE_TURN])
def test_only_messages_marked_as_learnt_are_learnt(
    small: Tokenizer, format: str
) -> None:
    texts = ("Hi", "Hello", "And you?", "Well.", "Bye", "Ciao")
    whole = encode(small, dialog(*texts), format)
    runs = learnt(*whole[0])
    assert len(runs) == 3
    flags = [False, False, False, True, False, True]
    ((ids, mask),) = encode(small, dialog(*texts)._replace(learnt=flags), format)
    assert ids == whole[0][0]
    assert learnt(ids, mask) == runs[1:]
    # The user's last message is left out, and its mark with it.
    more = Dialog(
        [*dialog(*texts).messages, *dialog("More?").messages], [*flags, False]
    )
    assert encode(small, more, format) == [(ids, mask)]
    nothing = dialog(*texts)._replace(learnt=[False] * 6)
    with pytest.raises(DataError, match="has no answer to learn from"):
        encode(small, nothing, format)


def test_an_input_is_appended_if_the_format_has_no_place_for_it(
    small: Tokenizer,
) -> None:
    asked = Message(role="user", content="Translate.", input="Oui.")
    content = Dialog([asked, Message(role="assistant", content="Yes.")])
    joined = dialog("Translate.\n\nOui.", "Yes.")
    assert encode(small, content, "vicuna") == encode(small, joined, "vicuna")
    ((ids, _),) = encode(small, content, "alpaca")
    assert "### Input:\nOui.\n\n### Response:" in small.decode(ids)


@given(text=TEXT.filter(bool), length=st.integers(1, 9))
def test_windows_of_a_text_target_every_token_once(
    small: Tokenizer, text: str, length: int
) -> None:
    whole = small.encode(text, bos=True, eos=True)
    windows = encode(small, text, "text", length)
    assert all(mask == [True] * len(ids) for ids, mask in windows)
    assert all(len(ids) == length + 1 for ids, _ in windows[:-1])
    assert [id for ids, _ in windows for id in ids[1:]] == whole[1:]
    assert [id for ids, _ in windows for id in ids[:-1]] == whole[:-1]


@given(lines=st.lists(st.text("ab 1é", max_size=6), min_size=1, max_size=8))
def test_pieces_of_a_document_have_the_tokens_of_the_whole(
    small: Tokenizer, lines: list[str]
) -> None:
    encoder = Encoder(tokenizer=small, format="text", length=4096)
    ids: list[int] = []
    for i, line in enumerate(lines):
        record = Record(
            LOCATION,
            ("\n" if i else "x") + line + ("\n" if i < len(lines) - 1 else "x"),
            begins=i == 0,
            ends=i == len(lines) - 1,
        )
        (example,) = encoder.encode(record).examples
        ids += example.ids.tolist()[1 if i else 0 :]
    text = "x" + "\n".join(lines) + "x"
    assert ids == small.encode(text, bos=True, eos=True)


def test_records_that_a_format_cannot_write_are_named(small: Tokenizer) -> None:
    unsafe = dialog("[INST]", "b")
    for content, format, complaint, reason in (
        ("text", "alpaca", "plain text, which has no place in alpaca", "unsuitable"),
        (dialog("a", "b"), "text", "a dialog, not plain text", "unsuitable"),
        (Pair("a", "b"), "infilling", "a dialog, not plain infil", "unsuitable"),
        (dialog("a", "b", "c"), "alpaca", "one turn", "unsuitable"),
        (Dialog([]), "vicuna", "no user message", "unsuitable"),
        (unsafe, "llama2-chat", r"special tag \[INST\]", "unsuitable"),
        ("\ud800", "text", "surrogate", "unsuitable"),
        (dialog("a"), "vicuna", "no answer to learn from", "empty"),
        (dialog("a", " "), "alpaca", "no answer to learn from", "empty"),
        (Pair("a", ""), "text", "no answer to learn from", "empty"),
        ("", "text", "empty text", "empty"),
    ):
        with pytest.raises(DataError, match=complaint) as raised:
            encode(small, content, format)  # type: ignore[arg-type]
        assert str(raised.value).startswith("a.jsonl, line 7: ")
        assert raised.value.reason == reason


def test_long_records_are_refused_or_cut(small: Tokenizer) -> None:
    content = dialog("Hi", "Hello, how are you today, my friend?")
    ((ids, mask),) = encode(small, content, "vicuna")
    assert encode(small, content, "vicuna", len(ids) - 1) == [(ids, mask)]
    most = len(ids) - 4
    for on_long in ("drop", "refuse"):
        with pytest.raises(DataError, match=f"{len(ids)} tokens, more than the {most}"):
            encode(small, content, "vicuna", most - 1, on_long=on_long)
    cut_off = encode(small, content, "vicuna", most - 1, on_long="truncate")
    assert cut_off == [(ids[:most], mask[:most])]
    with pytest.raises(DataError, match="within a sequence's length") as raised:
        encode(small, content, "vicuna", mask.index(True) - 1, on_long="truncate")
    assert raised.value.reason == "empty"


def test_settings_out_of_range_are_refused(small: Tokenizer) -> None:
    with pytest.raises(PromptError, match="did you mean 'alpaca'"):
        Encoder(tokenizer=small, format="alpacca", length=8)
    with pytest.raises(DataError, match="sequence length must be positive, got 0"):
        Encoder(tokenizer=small, format="text", length=0)
    plain = Tokenizer(small.contents)
    with pytest.raises(DataError, match="no infilling pieces"):
        Encoder(tokenizer=plain, format="infilling", length=8)
    assert {"llama2-chat", "alpaca", "vicuna", "orca2", "wizardlm"} < {*DATA_FORMATS}


# Chat templates

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + "
    "'<|im_end|>\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"
)


def with_templates(small: Tokenizer, **templates: str) -> Tokenizer:
    return small.replace_settings(chat_templates=templates)


def test_the_answers_of_a_template_are_learnt(small: Tokenizer) -> None:
    tokenizer = with_templates(small, default=TEMPLATE)
    content = dialog("Hi", "the sun", "a", "Bye", "left out", system="S")
    first, last = "the sun<|im_end|>", "Bye<|im_end|>"
    for flags, answers in (
        ((), [first, last]),
        ((False, False, False, False, True, False), [last]),
    ):
        record = content._replace(learnt=flags)
        ((ids, mask),) = encode(tokenizer, record, "template")
        assert (
            ids
            == get_format("template", tokenizer).encode(tokenizer, content.messages)[
                : len(ids)
            ]
        )
        assert [tokenizer.decode(run) for run in learnt(ids, mask)] == answers


def test_templates_take_messages_in_any_order(small: Tokenizer) -> None:
    tokenizer = with_templates(small, default=TEMPLATE)
    messages = dialog("a", "b", "c", "d").messages
    content = Dialog([messages[0], messages[0], messages[1], messages[3], messages[2]])
    ((ids, mask),) = encode(tokenizer, content, "template")
    runs = [tokenizer.decode(run) for run in learnt(ids, mask)]
    assert runs == ["b<|im_end|>", "d<|im_end|>"]
    joined = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = with_templates(small, default=joined)
    flagged = content._replace(learnt=(False, False, True, False, False))
    with pytest.raises(DataError, match=r"line 7: says which .* apart"):
        encode(tokenizer, flagged, "template")


def test_a_resumed_run_has_the_same_template(small: Tokenizer) -> None:
    def settings(template: str, now: datetime.datetime | None = None) -> dict[str, Any]:
        tokenizer = with_templates(small, default=template)
        encoder = Encoder(tokenizer=tokenizer, format="template", length=8, now=now)
        return encoder.settings()

    now, later = datetime.datetime(2024, 7, 26), datetime.datetime(2024, 7, 27)
    assert settings(TEMPLATE) == settings(TEMPLATE, now)
    assert settings(TEMPLATE) != settings(TEMPLATE + " ")
    dated = "{{ strftime_now('%d') }}"
    assert settings(dated, now) != settings(dated, later)
    other = with_templates(small, default=TEMPLATE)
    alpaca = [
        Encoder(tokenizer=tokenizer, format="alpaca", length=8).settings()
        for tokenizer in (small, other)
    ]
    assert alpaca[0] == alpaca[1]


@pytest.mark.parametrize(
    ("lines", "templates", "format"),
    [
        (['{"messages": [{"role": "user", "content": "a"}]}'], {"default": "x"}, 1),
        (['{"instruction": "a", "output": "b"}'], {"default": "x"}, 1),
        (["{broken", '{"conversations": [{"from": "human", "value": "a"}]}'],
         {"default": "x"}, 1),
        (['{"messages": [{"role": "user", "content": "a"}]}'], {"tool_use": "x"}, 0),
        (['{"messages": [{"role": "user", "content": "a"}]}'], {}, 0),
        (['{"text": "a", "messages": [{"role": "user", "content": "a"}]}'],
         {"default": "x"}, 0),
        (['{"prompt": "a", "response": "b"}'], {"default": "x"}, 0),
    ],
)  # fmt: skip
def test_the_default_format_is_the_template_for_dialogs(
    small: Tokenizer,
    tmp_path: pathlib.Path,
    lines: list[str],
    templates: dict[str, str],
    format: int,
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(lines))
    tokenizer = with_templates(small, **templates)
    loader = Loader([file], tokenizer, batch_size=1, length=8)
    assert loader.format == ("text", "template")[format]


# Infilling


@given(text=TEXT, record=st.integers(0, 10**9))
def test_a_cut_document_is_the_whole_document(text: str, record: int) -> None:
    parts = cut(text, 1, record)
    assert parts == cut(text, 1, record)
    if parts is not None:
        assert parts.prefix + parts.middle + parts.suffix == text


def test_cuts_are_as_frequent_and_as_even_as_the_papers() -> None:
    text = "x" * 99
    cuts = [cut(text, 0, record) for record in range(8000)]
    made = [parts for parts in cuts if parts is not None]
    assert len(made) / len(cuts) == pytest.approx(0.9, abs=0.01)
    first = np.mean([parts.suffix_first for parts in made])
    assert first == pytest.approx(0.5, abs=0.02)
    # Of two even cuts the smaller and the larger lie at a third and two thirds.
    lengths = np.array([[len(part) for part in parts[:3]] for parts in made])
    assert lengths.mean(axis=0) == pytest.approx([33, 33, 33], abs=1)
    ends = np.concatenate([lengths[:, 0], lengths[:, 0] + lengths[:, 1]])
    counts = np.histogram(ends, bins=10, range=(0, 100))[0]
    assert counts / len(ends) == pytest.approx([0.1] * 10, abs=0.01)
    assert not any(cut(text, 0, record, rate=0.0) for record in range(99))


def check_layout(t: Tokenizer) -> None:
    pieces = t.infilling
    assert pieces is not None
    prefix, middle, suffix = "def f(x):\n    re", "turn x", "\n\nf(2)\n"
    psm = encode_cut(t, Cut(prefix, middle, suffix, False))
    prompt = infilling_prompt(t, prefix, suffix)
    assert psm == [*prompt, *t.encode_infilling(middle), pieces.end]
    spm = encode_cut(t, Cut(prefix, middle, suffix, True))
    assert spm == [
        t.bos_id, pieces.prefix, pieces.suffix, *t.encode_infilling(suffix),
        pieces.middle, *t.encode(prefix + middle, bos=False, eos=False), pieces.end,
    ]  # fmt: skip


def test_infilling_examples_have_the_papers_layout(small: Tokenizer) -> None:
    check_layout(small)


def test_infilling_examples_with_code_llamas_pieces(assets: Any) -> None:
    check_layout(Tokenizer.from_file(assets / "tokenizers" / "codellama.model"))


@given(text=st.text("ab \n", min_size=1, max_size=40), record=st.integers(0, 99))
def test_documents_that_do_not_fit_stay_text(
    small: Tokenizer, text: str, record: int
) -> None:
    encoder = Encoder(tokenizer=small, format="infilling", length=16, seed=3)
    found = encoder.encode(Record(LOCATION, text), record).examples
    parts = cut(text, 3, record)
    made = None if parts is None else encode_cut(small, parts)
    if made is not None and len(made) <= 17:
        assert [example.ids.tolist() for example in found] == [made]
        assert found[0].mask.all()
    else:
        windows = encode(small, text, "text", 16)
        assert [e.ids.tolist() for e in found] == [ids for ids, _ in windows]


def test_a_piece_of_a_document_stays_text(small: Tokenizer) -> None:
    encoder = Encoder(tokenizer=small, format="infilling", length=99, infilling_rate=1)
    piece = Record(LOCATION, "a b", begins=True, ends=False)
    (example,) = encoder.encode(piece).examples
    assert example.ids.tolist() == small.encode("a b", bos=True, eos=False)
