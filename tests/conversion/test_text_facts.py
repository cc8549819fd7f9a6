"""What checkpoints say about text, in every format: read, exported, never lost.

| fact                     | Hugging Face          | ours       | GGUF       | Meta     | llama2.c |
|--------------------------|-----------------------|------------|------------|----------|----------|
| added tokens, flags, ids | FILES, EXPORTS        | ROUND_TRIPS | test_gguf_ | pieces   | refused  |
| words that are one id    | FILES, EXPORTS        | ROUND_TRIPS | tokenizer  | pieces   | refused  |
| user-defined pieces      | EXPORTS               | ROUND_TRIPS | (1)        | the file | (2)      |
| ends of an answer        | FILES, left_out       | ROUND_TRIPS | (1)        | a note   | a note   |
| BOS and EOS rules        | FILES                 | ROUND_TRIPS | (1)        | a note   | a note   |
| rule of spaces           | FILES, EXPORTS        | ROUND_TRIPS | (1)        | a note   | a note   |
| templates                | FILES                 | ROUND_TRIPS | (1)        | a note   | a note   |
| sampling defaults        | FILES                 | ROUND_TRIPS | (1)        | a note   | a note   |

PEFT folders have the files of Hugging Face's, beside adapters. (1) Here as a round trip,
there against llama.cpp. (2) A note: its file has no kinds of pieces.
"""  # noqa: E501

import dataclasses
import json
import pathlib
import re
from typing import Any, get_args

import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers
from support.huggingface_folders import (
    ADDED,
    CHATML,
    CONFIG,
    TEMPLATE,
    decoder_of,
    json_of,
    template_processing,
    write_folder,
)
from support.huggingface_tokenizers import small_model
from support.models import random_params
from support.tokenizers import byte_level_tokenizer

from llama_jax.checkpoint.model_folder import read_tokenizer, save_params
from llama_jax.conversion import convert, open_source, prepare_conversion
from llama_jax.conversion.__main__ import main
from llama_jax.conversion.peft import write_peft
from llama_jax.conversion.tokenizer_comparison import compare_tokenizers
from llama_jax.errors import LlamaJaxError, TokenizerError
from llama_jax.loading import load
from llama_jax.model.lora import Lora, init_lora
from llama_jax.text.settings import AddedToken, PrefixSpace, TextSettings
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.adapters import merge_checkpoint

MODEL = {"tokenizer.model": small_model()}
TAGS = {320: AddedToken("<|im_start|>"), 321: AddedToken("<|im_end|>")}
WORD = {320: AddedToken("zorblat", special=False, normalized=True)}


def with_config(**fields: Any) -> dict[str, Any]:
    return {**MODEL, "tokenizer_config.json": fields}


def with_generation(**fields: Any) -> dict[str, Any]:
    return {**MODEL, "generation_config.json": fields}


FILES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": (MODEL, {}),
    "added_tokens.json: tags are special, words are not": (
        {**MODEL, "added_tokens.json": {"zorblat": 321, "<|im_end|>": 320}},
        {"added_tokens": {320: TAGS[321], 321: WORD[320]._replace(normalized=False)}},
    ),
    "added_tokens_decoder with flags": (
        with_config(added_tokens_decoder=decoder_of(WORD)), {"added_tokens": WORD},
    ),
    "flags that are left out": (
        with_config(added_tokens_decoder={"320": {"content": "zorblat"}}),
        {"added_tokens": WORD},
    ),
    "special by name": (
        with_config(
            added_tokens_decoder=decoder_of(WORD), extra_special_tokens=["zorblat"]
        ),
        {"added_tokens": {320: WORD[320]._replace(special=True)}},
    ),
    "gaps that an export fills": (
        with_config(added_tokens_decoder=decoder_of({321: AddedToken("[PAD321]")})),
        {},
    ),
    "tokenizer.json beside tokenizer.model": (
        {**MODEL, "tokenizer.json": json_of(post_processor=None)},
        {"added_tokens": TAGS, "add_bos": False},
    ),
    "tokenizer.json alone": (
        {"tokenizer.json": json_of(post_processor=template_processing(begins=True))},
        {"added_tokens": TAGS},
    ),
    "flags of tokenizer_config.json count": (
        {
            **with_config(added_tokens_decoder=decoder_of(WORD)),
            "tokenizer.json": json_of(
                added_tokens=[{"id": 320, "content": "zorblat", "special": True}],
                post_processor=template_processing(begins=True, ends=True),
            ),
        },
        {"added_tokens": WORD, "add_eos": True},
    ),
    "a post-processor counts for the general class": (
        {
            **with_config(tokenizer_class="TokenizersBackend", add_bos_token=True),
            "tokenizer.json": json_of(post_processor=None),
        },
        {"added_tokens": TAGS, "add_bos": False},
    ),
    "add_bos_token, add_eos_token": (
        with_config(add_bos_token=False, add_eos_token=True),
        {"add_bos": False, "add_eos": True},
    ),
    "ids by name": (
        with_config(
            eos_token={"content": "<|im_end|>"}, pad_token="<unk>", bos_token="<s>",
            unk_token=None, added_tokens_decoder=decoder_of(TAGS),
        ),
        {"added_tokens": TAGS, "eos_id": 321, "pad_id": 0},
    ),
    "special_tokens_map.json": (
        {**MODEL, "special_tokens_map.json": {"eos_token": "<s>"}}, {"eos_id": 1},
    ),
    "legacy": (with_config(legacy=False), {"prefix_space": "first_once"}),
    "no space": (with_config(add_prefix_space=False), {"prefix_space": "never"}),
    "Metaspace": (
        {**MODEL, "tokenizer.json": json_of("first_once")},
        {"added_tokens": TAGS, "add_bos": False, "prefix_space": "first_once"},
    ),
    "a template": (
        with_config(chat_template="{{ x }}"), {"chat_templates": {"default": "{{ x }}"}}
    ),
    "named templates": (
        with_config(chat_template=[{"name": "rag", "template": "{{ x }}"}]),
        {"chat_templates": {"rag": "{{ x }}"}},
    ),
    "files of templates": (
        with_config(chat_template="old") | {
            "chat_template.jinja": "{{ new }}",
            "additional_chat_templates/rag.jinja": "{{ rag }}",
        },
        {"chat_templates": {"default": "{{ new }}", "rag": "{{ rag }}"}},
    ),
    "one end": (with_generation(eos_token_id=321), {"end_ids": (321,)}),
    "the union of ends": (
        with_generation(eos_token_id=[2, 320]) | {"config.json": {"eos_token_id": 321}},
        {"end_ids": (320, 321)},
    ),
    "sampling": (
        with_generation(do_sample=True, temperature=0.6, top_p=0.9, min_p=None),
        {"sampling": {"temperature": 0.6, "top_p": 0.9}},
    ),
    "greedy": (
        with_generation(do_sample=False, temperature=0.6, repetition_penalty=1.2),
        {"sampling": {"temperature": 0, "repetition_penalty": 1.2}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_each_file_of_a_folder_counts(tmp_path: pathlib.Path, kind: str) -> None:
    files, expected = FILES[kind]
    source = open_source(write_folder(tmp_path / "hf", files))
    tokenizer, _ = source.find_tokenizer()
    assert tokenizer.settings == TextSettings(**expected)
    assert not source.text_notes()


LEFT_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "begin of sequence": (with_generation(eos_token_id=[1, 2]), "eos_token_id 1 of "),
    "unknown text": (
        {**MODEL, "config.json": {"eos_token_id": 0}}, "0 of config.json .* unknown",
    ),
    "padding": (
        with_config(pad_token="▁") | {"config.json": {"eos_token_id": 304}}, "padding"
    ),
    "no row": (with_generation(eos_token_id=326), "326 .* no token of the model"),
    "too many tokens": (
        with_config(added_tokens_decoder=decoder_of({326: TAGS[320]})),
        "from id 326 on are left out: the model has 326 ids",
    ),
    "a piece of another name": (
        with_config(added_tokens_decoder=decoder_of({5: TAGS[320]})),
        "left out: its id 5 is '<0x02>'",
    ),
    "an unknown name": (with_config(pad_token="<pad>"), "pad_token '<pad>' is left"),
    "other spaces": (
        MODEL | {"tokenizer.json": json_of(normalizer={"type": "X"}, added_tokens=[])},
        "tokenizer.json handles spaces in a way of its own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_is_left_out_is_noted(
    tmp_path: pathlib.Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files, words = LEFT_OUT[kind]
    folder = write_folder(tmp_path / "hf", files)
    tokenizer, _ = (source := open_source(folder)).find_tokenizer()
    (note,) = source.text_notes()
    assert re.search(words, note)
    assert tokenizer.end_ids == (2,)
    assert not tokenizer.added_tokens
    assert main([str(folder), str(tmp_path / "ours")]) == 0
    assert f"note: {note}" in capsys.readouterr().out
    assert main(["inspect", str(folder)]) == 0
    assert note in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({**MODEL, "added_tokens.json": {"a": "b"}}, "id of 'a' is 'b'"),
        (
            with_config(added_tokens_decoder={"x": {"content": "a"}}),
            "has the entry 'x'",
        ),
        (with_config(added_tokens_decoder={"320": "a"}), "has the entry '320'"),
        (with_config(add_bos_token="yes"), "add_bos_token is 'yes'"),
        (with_config(chat_template=3), "chat_template must be a text"),
        (with_config(chat_template=[{"name": "a"}]), "chat_template must be a text"),
        (with_generation(eos_token_id="</s>"), "eos_token_id is '</s>'"),
        (with_generation(top_p="high"), "top_p is 'high'"),
        ({**MODEL, "tokenizer.json": "{"}, "tokenizer.json: is not JSON"),
    ],
)
def test_damaged_files_are_named(
    tmp_path: pathlib.Path, files: dict[str, Any], words: str
) -> None:
    source = open_source(write_folder(tmp_path / "hf", files))
    with pytest.raises(LlamaJaxError, match=words):
        source.find_tokenizer()


# Round trips


def every_fact(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a setting of each kind that differs from its file."""
    size = tokenizer.vocab_size
    return tokenizer.replace_settings(
        added_tokens={
            **tokenizer.settings.added_tokens,
            size + 1: AddedToken("<|end|>", rstrip=True),
            size + 3: AddedToken("florbat", special=False, normalized=True),
        },
        eos_id=size + 1,
        end_ids=(2,),
        pad_id=size + 1,
        add_bos=False,
        add_eos=True,
        chat_templates={"default": TEMPLATE, "rag": "{{ x }}"},
        sampling={"temperature": 0.5, "top_k": 9},
    )


ROUND_TRIPS = {
    "SentencePiece": lambda: every_fact(Tokenizer(small_model())),
    "user-defined pieces": lambda: Tokenizer(
        small_model(user_defined=("<ent>", "a|b"))
    ),
    "no space in front": lambda: Tokenizer(small_model(dummy_prefix=False)),
    "byte-level": lambda: every_fact(byte_level_tokenizer()),
    **{
        f"spaces {rule}": lambda rule=rule: Tokenizer(
            small_model(), settings=TextSettings(prefix_space=rule)
        )
        for rule in get_args(PrefixSpace)
    },
}


@pytest.mark.parametrize("kind", ROUND_TRIPS)
def test_every_fact_survives_every_format_that_stores_it(
    tmp_path: pathlib.Path, kind: str
) -> None:
    tokenizer = ROUND_TRIPS[kind]()
    config = CONFIG.replace(vocab_size=max(330, tokenizer.vocab_size + 9))
    save_params(tmp_path / "ours", random_params(config), config, tokenizer=tokenizer)
    stored = read_tokenizer(tmp_path / "ours")
    assert stored is not None
    assert stored.settings == tokenizer.settings
    for name in ("hf", "json", "gguf"):
        target = tmp_path / (name if name != "gguf" else "x.gguf")
        format: Any = "gguf" if name == "gguf" else "hf"
        if format == "gguf" and ("once" in kind or kind == "spaces first"):
            continue  # llama.cpp has no such rule
        result = convert(tmp_path / "ours", target, target_format=format)
        assert not result.notes
        if name == "json":
            (target / "tokenizer.model").unlink(missing_ok=True)
        convert(target, tmp_path / f"{name}-ours", dtype="float32")
        source = open_source(tmp_path / f"{name}-ours")
        assert source.config == config
        again, _ = source.find_tokenizer()
        assert not list(compare_tokenizers(tokenizer, again, config.vocab_size))
        assert again.prefix_space == tokenizer.prefix_space
        # The rule of spaces may be the new file's own.
        settings = dataclasses.replace(tokenizer.settings, prefix_space=None)
        assert dataclasses.replace(again.settings, prefix_space=None) == settings


# Exports


@pytest.mark.parametrize("kind", ROUND_TRIPS)
def test_tokenizers_reads_the_ids_of_an_export(
    tmp_path: pathlib.Path, kind: str
) -> None:
    tokenizer = ROUND_TRIPS[kind]()
    config = CONFIG.replace(vocab_size=max(330, tokenizer.vocab_size + 9))
    save_params(tmp_path / "ours", random_params(config), config, tokenizer=tokenizer)
    convert(tmp_path / "ours", tmp_path / "hf", target_format="hf")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    for text in (
        "once upon a time", "  two florbat ", "<|end|>  a<ent>b", "a|b", "<ent>",
        "a <ent> a|ba", "<s>a</s> florbatflorbat ü🦙",
    ):  # fmt: skip
        ids = tokenizer.encode_marked(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        begin = tokenizer.encode("", bos=tokenizer.settings.add_bos, eos=False)
        end = tokenizer.encode("", bos=False, eos=tokenizer.settings.add_eos)
        assert theirs.encode(text).ids == [*begin, *ids, *end]
    for id, token in tokenizer.tokens.items():
        assert theirs.token_to_id(token.text) == id


def test_user_defined_pieces_give_sentencepieces_ids_after_export(
    tmp_path: pathlib.Path,
) -> None:
    model = small_model(user_defined=("<ent>", "qq"))
    folder = write_folder(tmp_path / "hf", {"tokenizer.model": model})
    convert(folder, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", target_format="hf")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json"))
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in ("a <ent> dog", "<ent>", "qqqq a", " qq", "time<ent>qq"):
        assert theirs.encode(text, add_special_tokens=False).ids == sp.encode(text)


def test_an_export_lists_every_end_and_every_default(tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "hf", CHATML)
    convert(folder, tmp_path / "out", target_format="hf")
    contents = {
        file.name: json.loads(file.read_text())
        for file in (tmp_path / "out").glob("*.json")
    }
    generation = contents["generation_config.json"]
    expected = {**CHATML["generation_config.json"], "eos_token_id": [322, 2]}
    assert generation == {**expected, "bos_token_id": 1, "pad_token_id": 320}
    assert contents["config.json"]["eos_token_id"] == [322, 2]
    written = contents["tokenizer_config.json"]
    asked = CHATML["tokenizer_config.json"]
    assert written["chat_template"] == asked["chat_template"]
    assert written["eos_token"] == "<|im_end|>"
    assert written["add_bos_token"] is False
    assert written["added_tokens_decoder"].items() >= decoder_of(ADDED).items()
    assert list(written["added_tokens_decoder"])[3:] == [
        "320", "321", "322", "323", "324",
    ]  # fmt: skip


# Formats that store less


def test_metas_format_has_a_piece_for_each_added_token(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "hf", CHATML)
    out = tmp_path / "meta"
    assert main([str(folder), str(out), "--to", "meta"]) == 0
    assert (
        "note: the meta format does not store flags of the added tokens, the ids that "
        "end an answer, eos_id, pad_id, add_bos, chat_templates, sampling\n"
    ) in capsys.readouterr().out
    model = (out / "tokenizer.model").read_bytes()
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert sp.vocab_size() == CONFIG.vocab_size
    assert [sp.id_to_piece(id) for id in ADDED] == [t.text for t in ADDED.values()]
    assert sp.is_control(322)
    assert 324 in sp.encode("a zorblat sat")
    assert sp.is_unused(323)
    tokenizer, _ = open_source(out, max_seq_len=64).find_tokenizer()
    assert tokenizer.special_texts[3:] == ("[PAD]", "<|im_start|>", "<|im_end|>")
    assert tokenizer.unnamed_ids(326) == (323, 325)
    status = main(["verify", str(folder), str(out), "--max-seq-len", "64"])
    assert status == 1
    assert "chat_templates: {'default'" in capsys.readouterr().out


def test_added_tokens_that_a_format_cannot_store_are_refused(
    tmp_path: pathlib.Path,
) -> None:
    folder = write_folder(tmp_path / "hf", CHATML)
    with pytest.raises(
        TokenizerError, match=r"'\[PAD\]' \(id 320\) has no place in ll"
    ):
        prepare_conversion(folder, tmp_path / "x.bin")
    twice = decoder_of({320: AddedToken("he", special=False)})
    files = {**MODEL, "tokenizer_config.json": {"added_tokens_decoder": twice}}
    clash = write_folder(tmp_path / "clash", files)
    with pytest.raises(TokenizerError, match="'he' is a piece of the model too"):
        prepare_conversion(clash, tmp_path / "meta", target_format="meta")


def test_llama2c_notes_what_it_does_not_store(tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "hf", with_config(add_bos_token=False))
    prepared = prepare_conversion(folder, tmp_path / "x.bin")
    assert prepared.notes == ("the llama2c format does not store add_bos",)


def test_verify_finds_ids_that_were_swapped(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = {"<|im_end|>": 320, "<|im_start|>": 321, "[PAD]": 322}
    a = write_folder(tmp_path / "a", {**MODEL, "added_tokens.json": swapped})
    swapped = {"<|im_end|>": 322, "<|im_start|>": 321, "[PAD]": 320}
    b = write_folder(tmp_path / "b", {**MODEL, "added_tokens.json": swapped})
    assert main(["verify", str(a), str(a)]) == 0
    assert "text: tokenizers, ends, templates and defaults agree" in (
        capsys.readouterr().out
    )
    assert main(["verify", str(a), str(b)]) == 1
    assert "text: the added tokens: {320: '<|im_end|>', 322: '[PAD]'}" in (
        capsys.readouterr().out
    )


# Adapters


def test_the_tokenizer_beside_adapters_counts(tmp_path: pathlib.Path) -> None:
    base = write_folder(tmp_path / "base", MODEL)
    lora = Lora(rank=2, alpha=4.0, targets=("q_proj",))
    adapters = init_lora(CONFIG, jax.random.key(0), lora)
    write_peft(tmp_path / "adapter", adapters, CONFIG, lora)
    assert load(base, adapter=tmp_path / "adapter").tokenizer.end_ids == (2,)
    for name, content in CHATML.items():
        if name != "generation_config.json":
            text = (
                content if isinstance(content, bytes) else json.dumps(content).encode()
            )
            (tmp_path / "adapter" / name).write_bytes(text)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    for tokenizer in (
        load(base, adapter=tmp_path / "adapter").tokenizer,
        load(tmp_path / "merged").tokenizer,
    ):
        assert tokenizer.end_ids == (322, 2)
        assert tokenizer.settings.chat_templates["default"] == TEMPLATE
        assert tokenizer.settings.added_tokens == ADDED
    given = Tokenizer(small_model())
    loaded = load(base, adapter=tmp_path / "adapter", tokenizer=given)
    assert loaded.tokenizer is given
    assert np.isfinite(np.asarray(jax.tree.leaves(loaded.params)[0])).all()
