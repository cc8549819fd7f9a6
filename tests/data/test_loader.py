"""The loader: every record once per epoch, the same batches anywhere and again."""

import collections
import itertools
import json
import pathlib
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.batch import Batch
from llama_jax.data.loader import Loader
from llama_jax.errors import DataError
from llama_jax.loading import bundled
from llama_jax.text.tokenizer import Tokenizer

RECORDS = 41
LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(bundled() / "tokenizer.model")


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Records whose number is their text, of several lengths."""
    path = tmp_path_factory.mktemp("data") / "numbered.jsonl"
    lines = [json.dumps({"text": f"#{i}" + " a" * (i % 17)}) for i in range(RECORDS)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Pairs good, malformed, empty and too long, in turn."""
    path = tmp_path_factory.mktemp("data") / "mixed.jsonl"
    with path.open("w") as file:
        for i in range(10):
            for record in (
                {"prompt": f"{i}", "response": "yes"},
                {"prompt": f"{i}"},
                {"messages": [{"role": "user", "content": "Hi"}]},
                {"prompt": "a " * 300, "response": "b"},
            ):
                file.write(json.dumps(record) + "\n")
    return path


def load(path: pathlib.Path, tokenizer: Tokenizer, **options: Any) -> Loader:
    defaults = {
        "format": "text", "batch_size": 4, "length": LENGTH, "workers": 0,
        "prefetch": 0, "look_ahead": 5,
    }  # fmt: skip
    return Loader([path], tokenizer, **{**defaults, **options})


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x, y)
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


def joined(parts: list[Batch]) -> Batch:
    """The global batch of several processes' rows."""
    return Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))  # type: ignore[arg-type]


def texts(batches: list[Batch], tokenizer: Tokenizer) -> list[str]:
    """What each segment of the batches says, in their order."""
    found = []
    for batch in batches:
        for tokens, targets, _, segments, _ in zip(
            *map(np.asarray, batch), strict=True
        ):
            for number in range(1, segments.max(initial=0) + 1):
                slots = np.flatnonzero(segments == number)
                ids = [*tokens[slots].tolist(), int(targets[slots[-1]])]
                found.append(tokenizer.decode(ids))
    return found


@settings(max_examples=25)
@given(
    share=st.integers(1, 3),
    processes=st.integers(1, 3),
    workers=st.integers(0, 2),
    prefetch=st.integers(0, 2),
    packing=st.sampled_from(["pack", "pad"]),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_each_record_comes_once_per_epoch_with_any_workers_and_processes(
    numbered: pathlib.Path,
    tokenizer: Tokenizer,
    share: int,
    processes: int,
    workers: int,
    prefetch: int,
    packing: str,
    epochs: int,
    seed: int,
) -> None:
    options: dict[str, Any] = {
        "batch_size": share * processes, "packing": packing, "epochs": epochs,
        "seed": seed,
    }  # fmt: skip
    alone = list(load(numbered, tokenizer, **options))
    shares = [
        list(
            load(
                numbered, tokenizer, **options, workers=workers, prefetch=prefetch,
                process_index=index, process_count=processes,
            )
        )
        for index in range(processes)
    ]  # fmt: skip
    assert same([joined(list(parts)) for parts in zip(*shares, strict=True)], alone)
    expected = {f"#{i}" + " a" * (i % 17) for i in range(RECORDS)}
    seen = texts(alone, tokenizer)
    assert len(seen) == epochs * RECORDS
    for epoch in range(epochs):  # not only on the whole, but one after another
        assert set(seen[epoch * RECORDS :][:RECORDS]) == expected


@settings(max_examples=25)
@given(
    step=st.integers(0, 25),
    again=st.integers(0, 5),
    packing=st.sampled_from(["pack", "pad", "split"]),
    length=st.sampled_from([5, LENGTH]),
    processes=st.sampled_from([1, 2, 4]),
    prefetch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_a_resumed_loader_continues_bit_for_bit_with_any_number_of_processes(
    numbered: pathlib.Path,
    tokenizer: Tokenizer,
    step: int,
    again: int,
    packing: str,
    length: int,
    processes: int,
    prefetch: int,
    shuffle: bool,
) -> None:
    options: dict[str, Any] = {
        "packing": packing, "length": length, "epochs": 3, "shuffle": shuffle,
    }  # fmt: skip
    whole = load(numbered, tokenizer, **options)
    batches = list(whole)
    first = load(numbered, tokenizer, **options, prefetch=prefetch, workers=1)
    assert same(list(itertools.islice(first, step)), batches[:step])
    state = json.loads(json.dumps(first.state()))
    first.close()
    second = load(numbered, tokenizer, **options, prefetch=prefetch)
    second.restore(state)
    assert same(
        list(itertools.islice(second, again)), batches[step : step + again]
    )  # fmt: skip
    state = json.loads(json.dumps(second.state()))
    shares = []
    for index in range(processes):
        loader = load(
            numbered, tokenizer, **options, process_index=index, process_count=processes
        )
        loader.restore(state)
        shares.append(list(loader))
        assert loader.state() == whole.state()
    parts = [joined(list(rows)) for rows in zip(*shares, strict=True)]
    assert same(parts, batches[step + again :])
    assert loader.statistics == whole.statistics


def test_a_new_iteration_continues_after_the_last_batch(
    numbered: pathlib.Path, tokenizer: Tokenizer
) -> None:
    whole = list(load(numbered, tokenizer, epochs=2))
    with load(numbered, tokenizer, epochs=2, prefetch=2, workers=2) as loader:
        found = list(itertools.islice(loader, 3))
        loader.close()
        found += itertools.islice(loader, 2)
        found += loader
        assert same(found, whole)
        assert list(loader) == []
        assert loader.progress == 2
        assert loader.seconds_waited > 0
    assert len(loader) == RECORDS


def test_epochs_have_different_orders_unless_shuffling_is_off(
    numbered: pathlib.Path, tokenizer: Tokenizer
) -> None:
    def orders(**options: Any) -> list[list[str]]:
        loader = load(numbered, tokenizer, packing="pad", epochs=2, **options)
        seen = texts(list(loader), tokenizer)
        return [seen[:RECORDS], seen[RECORDS:]]

    in_order = [f"#{i}" + " a" * (i % 17) for i in range(RECORDS)]
    assert orders(shuffle=False) == [in_order, in_order]
    first, second = orders(seed=1)
    assert first != second
    assert orders(seed=1) == [first, second]
    assert orders(seed=2)[0] not in (first, second, in_order)


def test_split_rows_are_full_and_target_every_token_once(
    numbered: pathlib.Path, tokenizer: Tokenizer
) -> None:
    loader = load(numbered, tokenizer, packing="split", length=10, epochs=2)
    batches = list(loader)
    targets = np.concatenate([b.targets[b.loss_mask > 0] for b in batches])  # type: ignore[index]
    expected = collections.Counter(
        id
        for i in range(RECORDS)
        for id in tokenizer.encode(f"#{i}" + " a" * (i % 17), bos=False, eos=True)
    )
    assert collections.Counter(targets.tolist()) == {
        id: 2 * count for id, count in expected.items()
    }
    counts = loader.statistics
    assert counts.tokens == counts.targets == 2 * expected.total()
    assert counts.slots - counts.tokens < 2 * 10  # the last row of each epoch


def test_dropped_records_are_counted_by_reason_and_named(
    mixed: pathlib.Path, tokenizer: Tokenizer
) -> None:
    loader = load(
        mixed, tokenizer, format="vicuna", length=256, on_bad="drop", epochs=2
    )
    batches = list(loader)
    found = loader.statistics
    assert found.records == 80
    assert found.dropped == {"malformed": 10, "empty": 10, "long": 10}
    assert found.examples == 20
    assert found.targets == sum(int(np.sum(b.loss_mask)) for b in batches)
    assert found.tokens == sum(int(np.sum(b.segment_ids > 0)) for b in batches)  # type: ignore[operator]
    assert found.fill_rate == found.tokens / (found.rows * 256)
    assert len(found.problems) == 30
    assert loader.statistics == found
    survey = loader.survey()
    assert (survey.records, survey.dropped) == (40, found.dropped)
    assert survey.rows == len(
        list(
            load(
                mixed,
                tokenizer,
                format="vicuna",
                length=256,
                on_bad="drop",
                epochs=1,
                batch_size=1,
            )
        )
    )
    lines = {int(text.split("line ")[1].split(":")[0]) for text in found.problems}
    assert lines == {n for n in range(1, 41) if n % 4 != 1}
    cut = load(
        mixed, tokenizer, format="vicuna", length=256, on_bad="drop", epochs=1,
        on_long="truncate",
    )  # fmt: skip
    assert len(list(cut)) > 0
    assert cut.statistics.dropped == {"malformed": 10, "empty": 20}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_refused_record_raises_every_time(
    mixed: pathlib.Path, tokenizer: Tokenizer, prefetch: int
) -> None:
    for options, complaint in (
        ({}, "line 2: has 'prompt', but neither"),
        ({"on_bad": "drop", "on_long": "refuse"}, "line 4: has .* tokens, more than"),
    ):
        loader = load(
            mixed, tokenizer, format="vicuna", length=256, epochs=1, shuffle=False,
            prefetch=prefetch, workers=prefetch, **options,  # type: ignore[arg-type]
        )  # fmt: skip
        for _ in range(2):
            with pytest.raises(DataError, match=complaint):
                list(loader)


def test_the_first_refused_record_of_the_file_is_named(
    tmp_path: pathlib.Path, tokenizer: Tokenizer
) -> None:
    lines = ['{"text": "a"}'] * 40
    lines[7] = lines[23] = '{"text": ""}'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    for seed in range(3):
        with pytest.raises(DataError, match="line 8: is an empty text"):
            list(load(path, tokenizer, epochs=1, seed=seed))


def test_data_with_nothing_to_learn_is_refused(
    tmp_path: pathlib.Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"text": ""}\n')
    loader = load(path, tokenizer, on_bad="drop")
    complaint = "none of the 2 records can be learnt from .*1 malformed.*a.jsonl, line"
    with pytest.raises(DataError, match=complaint):
        next(loader)


def test_a_state_of_different_data_or_settings_is_refused(
    numbered: pathlib.Path, mixed: pathlib.Path, tokenizer: Tokenizer
) -> None:
    state = load(numbered, tokenizer).state()
    for path, options, complaint in (
        (mixed, {}, "the data was"),
        (numbered, {"seed": 1}, "the seed was 0 when .* and is 1 now"),
        (numbered, {"batch_size": 2}, "the batch size was 4"),
        (numbered, {"packing": "pad"}, "the packing was 'pack'"),
    ):
        with pytest.raises(DataError, match=complaint):
            load(path, tokenizer, **options).restore(state)  # type: ignore[arg-type]
    for broken in ({}, {**state, "waiting": [[0, 7, 0]]}, {**state, "epoch": "x"}):
        with pytest.raises(DataError, match="the saved state is damaged"):
            load(numbered, tokenizer).restore(broken)


def test_settings_out_of_range_are_refused(
    numbered: pathlib.Path, tokenizer: Tokenizer
) -> None:
    for options, complaint in (
        ({"process_count": 3}, "must divide the batch size"),
        ({"process_index": 1}, "process 1 of 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"epochs": 0}, "at least 1"),
        ({"packing": "split", "format": "vicuna"}, "only plain text allows"),
    ):
        with pytest.raises(DataError, match=complaint):
            load(numbered, tokenizer, **options)


def test_a_loader_that_is_dropped_leaves_no_thread(
    numbered: pathlib.Path, tokenizer: Tokenizer
) -> None:
    loader = load(numbered, tokenizer, prefetch=1, workers=2)
    next(loader)
    del loader
    for _ in range(100):
        names = [thread.name for thread in threading.enumerate()]
        if not any(name.startswith("llama_jax") for name in names):
            return
        time.sleep(0.05)
    pytest.fail(f"threads are left: {names}")


def test_a_row_may_have_a_hundred_thousand_slots(
    tmp_path: pathlib.Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"line {i} of a long text" for i in range(30_000)))
    loader = load(path, tokenizer, length=100_000, batch_size=1, epochs=1)
    batch = next(loader)
    assert batch.tokens.shape == (1, 100_000)
    assert np.array_equal(np.asarray(batch.positions)[0], np.arange(100_000))


def test_real_instructions_fill_rows_and_learn_only_answers(
    assets: pathlib.Path, llama2_tokenizer: Tokenizer
) -> None:
    path = assets / "text" / "alpaca-999.json"
    loader = load(
        path, llama2_tokenizer, format="alpaca", length=512, epochs=1, look_ahead=64,
        batch_size=16,
    )  # fmt: skip
    batches = list(loader)
    found = loader.statistics
    assert found.records == 999
    assert found.examples + found.dropped["long"] == 999
    assert found.fill_rate > 0.94
    learnt = np.concatenate([b.targets[b.loss_mask > 0] for b in batches])  # type: ignore[index]
    assert np.sum(learnt == llama2_tokenizer.eos_id) == found.examples
