"""Records with an answer, as a reward model reads them."""

from collections.abc import Callable, Sequence

from llama_jax.data.files import Corpus, Location, Raw
from llama_jax.data.records import Dialog, Pair, decode, parse
from llama_jax.errors import DataError
from llama_jax.rlhf.pairs import encode_dialog
from llama_jax.text.dialogs import Message, PromptFormat
from llama_jax.text.tokenizer import Tokenizer


def are_preferences(corpus: Corpus) -> bool:
    """Whether the first record is a preference, not one answer."""
    value = decode(corpus.read(0))
    return isinstance(value, dict) and {"chosen", "rejected"} <= value.keys()


def encode_answers(
    corpus: Corpus,
    tokenizer: Tokenizer,
    format: PromptFormat,
    *,
    length: int,
    on_problem: Callable[[DataError], None] | None = None,
) -> list[tuple[Location, list[int]]]:
    """Encode the records of a corpus, of any shape of `read_records` with an answer.

    Args:
      corpus: the records.
      tokenizer: of the reward model.
      format: prompt format of the dialogs.
      length: most tokens of a dialog.
      on_problem: called with the error of a record, which is dropped; None raises it.

    Returns:
      Location and ids of each dialog.

    Raises:
      DataError: a record has no answer, or does not fit; names file and line.
    """
    answers = []
    for number in range(len(corpus)):
        raw = corpus.read(number)
        try:
            dialog = _dialog(raw)
            try:
                ids = encode_dialog(dialog, tokenizer, format, length).ids
            except DataError as error:
                where = f"{raw.location}: {error}"
                raise DataError(where, reason=error.reason) from error
        except DataError as error:
            if on_problem is None:
                raise
            on_problem(error)
            continue
        answers.append((raw.location, ids))
    return answers


def _dialog(raw: Raw) -> Sequence[Message]:
    content = parse(raw).content
    if isinstance(content, Pair):
        return [
            Message(role="user", content=content.prompt),
            Message(role="assistant", content=content.response),
        ]
    if isinstance(content, Dialog) and content.messages[-1]["role"] == "assistant":
        return content.messages
    raise DataError(
        f"{raw.location}: has no answer to score; give a prompt with its response, or "
        "a dialog that ends with the assistant"
    )
