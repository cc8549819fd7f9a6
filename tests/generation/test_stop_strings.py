"""Stop strings: the scanner against a search in the whole text."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.errors import PromptError
from llama_jax.generation.stop_strings import StopScanner

texts = st.text("ab\n", max_size=30)
stop_lists = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4)
cuts = st.lists(st.integers(0, 30), max_size=10)


def cut_at_first_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The plain version: read character by character until a stop is complete."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)], True
    return text, False


def pieces(text: str, cuts: Sequence[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(texts, stop_lists, cuts)
def test_scanner_equals_a_search_in_the_whole_text(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    scanner = StopScanner(stops)
    shown = "".join(scanner.push(piece) for piece in pieces(text, cuts))
    shown += scanner.flush()
    assert (shown, scanner.stopped) == cut_at_first_stop(text, stops)


@given(texts, stop_lists, cuts)
def test_no_part_of_a_stop_string_is_ever_returned(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    scanner = StopScanner(stops)
    expected, _ = cut_at_first_stop(text, stops)
    shown = ""
    for piece in pieces(text, cuts):
        shown += scanner.push(piece)
        assert expected.startswith(shown)
        assert not any(stop in shown for stop in stops)


@given(texts, stop_lists, cuts)
def test_only_the_beginning_of_a_stop_string_is_buffered(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    scanner = StopScanner(stops)
    read = shown = ""
    for piece in pieces(text, cuts):
        read += piece
        shown += scanner.push(piece)
        if scanner.stopped:
            break
        buffered = read[len(shown) :]
        assert not buffered or any(stop.startswith(buffered) for stop in stops)


def test_nothing_follows_a_stop_string() -> None:
    scanner = StopScanner(["END"])
    assert scanner.push("abcEND, more") == "abc"
    assert scanner.stopped
    assert scanner.push("still more") == ""
    assert scanner.flush() == ""


def test_an_unfinished_stop_string_is_flushed() -> None:
    scanner = StopScanner(["END"])
    assert scanner.push("abcEN") == "abc"
    assert scanner.flush() == "EN"
    assert not scanner.stopped


def test_of_two_that_end_together_the_longer_counts() -> None:
    assert StopScanner(["</s>", "<s></s>"]).push("a<s></s>") == "a"


@pytest.mark.parametrize("stops", ["END", [""], ["a", ""]])
def test_anything_but_a_list_of_texts_is_refused(stops: Sequence[str]) -> None:
    with pytest.raises(PromptError, match="must be a list of strings"):
        StopScanner(stops)
