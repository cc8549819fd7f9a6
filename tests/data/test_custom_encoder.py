"""An encoder of one's own in the data pipeline: a function, or a class."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llama_jax.data.batch import Example
from llama_jax.data.encode import Encoder, FunctionEncoder, RecordEncoder
from llama_jax.data.loader import Loader
from llama_jax.data.records import Record
from llama_jax.errors import DataError
from llama_jax.loading import bundled
from llama_jax.text.tokenizer import Tokenizer


def count_up(record: Record) -> list[Example]:
    """The numbers up to a record's, of which the even ones are learnt."""
    assert isinstance(record.content, str)
    ids = np.arange(int(record.content) + 1, dtype=np.int32)
    return [Example(ids, ids % 2 == 0)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "numbers.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n}"}) + "\n" for n in range(2, 8)))
    return path


def load(
    file: pathlib.Path, encoder: Callable[..., Any] | RecordEncoder, **options: Any
) -> Loader:
    return Loader([file], encoder=encoder, batch_size=2, length=8, epochs=1, **options)


def test_a_function_makes_the_examples(file: pathlib.Path) -> None:
    loader = load(file, count_up, packing="pad", shuffle=False)
    batches = list(loader)
    assert len(batches) == 3
    np.testing.assert_array_equal(batches[0].tokens[1, :3], [0, 1, 2])
    np.testing.assert_array_equal(batches[0].targets[1, :3], [1, 2, 3])
    np.testing.assert_array_equal(batches[0].loss_mask[1, :4], [0, 1, 0, 0])
    assert loader.facts()["records"] == 6
    assert loader.facts()["tokens"] == 6 + 7


def test_a_loader_with_a_function_is_resumed(file: pathlib.Path) -> None:
    whole = list(load(file, count_up))
    loader = load(file, count_up)
    next(loader)
    other = load(file, count_up)
    other.restore(loader.state())
    for batch, wanted in zip(other, whole[1:], strict=True):
        for array, wanted_array in zip(batch, wanted, strict=True):
            np.testing.assert_array_equal(array, wanted_array)
    with pytest.raises(DataError, match="the encoder was 'count_up'"):
        load(file, lambda record: count_up(record)).restore(loader.state())


def test_examples_that_do_not_fit_are_dropped_and_counted(file: pathlib.Path) -> None:
    loader = Loader([file], encoder=count_up, batch_size=2, length=5, epochs=1)
    assert sum(int((batch.segment_ids > 0).sum()) for batch in loader) == 2 + 3 + 4 + 5
    assert loader.statistics.dropped == {"long": 2}
    refusing = Loader(
        [file], encoder=count_up, batch_size=2, length=5, epochs=1, on_long="refuse"
    )
    with pytest.raises(DataError, match=r"numbers.jsonl, line \d: has \d tokens, more"):
        list(refusing)


def test_records_without_examples_are_refused_with_their_place(
    file: pathlib.Path,
) -> None:
    with pytest.raises(DataError, match=r"numbers.jsonl, line 1: has nothing to learn"):
        next(load(file, lambda _: [], shuffle=False))


def test_encoders_are_of_the_protocol_and_of_one_length(file: pathlib.Path) -> None:
    encoder = FunctionEncoder(function=count_up, length=4)
    assert isinstance(encoder, RecordEncoder)
    tokenizer = Tokenizer.from_file(bundled() / "tokenizer.model")
    assert isinstance(
        Encoder(tokenizer=tokenizer, format="text", length=4), RecordEncoder
    )
    with pytest.raises(DataError, match="length is 4, but length is 8; make them"):
        load(file, encoder)
    with pytest.raises(DataError, match="there is no tokenizer; give one, or an enc"):
        Loader([file], batch_size=2, length=8)
