"""`/tokenize`, `/detokenize` and `/tokenizer_info`."""

from typing import Any

from llama_jax.errors import PromptError
from llama_jax.serve.api.call import Served
from llama_jax.serve.api.chat import make_chat, parse_messages
from llama_jax.serve.api.fields import Fields
from llama_jax.text.prompt_formats import completion_prompt
from llama_jax.text.tokenizer import Tokenizer


def tokenize(served: Served, fields: Fields) -> dict[str, Any]:
    """Encode a text (`prompt`) or a dialog (`messages`)."""
    tokenizer = served.tokenizer
    messages, prompt = fields.value("messages"), fields.string("prompt")
    special = fields.value("add_special_tokens")
    if special not in (None, True, False):
        raise fields.error("add_special_tokens", "must be true or false")
    fields.end()
    if (messages is None) == (prompt is None):
        raise fields.error("prompt", "or messages is needed, and not both")
    if prompt is None:
        if special is False:
            raise fields.error("add_special_tokens", "must be true with messages")
        dialog = parse_messages(messages)
        ids = list(make_chat(served, dialog, {}).prompt_ids)
    elif special is False:
        ids = tokenizer.encode(prompt, bos=False, eos=False)
    else:
        ids = completion_prompt(tokenizer, prompt)
    return {"tokens": ids, "count": len(ids), "max_model_len": served.context}


def detokenize(served: Served, fields: Fields) -> dict[str, Any]:
    """Decode token ids (`tokens`)."""
    ids = fields.value("tokens")
    fields.end()
    if not isinstance(ids, list) or not all(type(id) is int for id in ids):
        raise fields.error("tokens", "must be a list of token ids")
    if any(not 0 <= id < 1 << 31 for id in ids):
        raise PromptError("tokens: ids are not negative, and below 2**31")
    return {"prompt": served.tokenizer.decode(ids)}


def tokenizer_info(served: Served) -> dict[str, Any]:
    """Describe the tokenizer, as evaluation harnesses ask for it."""
    tokenizer = served.tokenizer
    templates = tokenizer.settings.chat_templates
    return {
        "model": served.name,
        "tokenizer_class": "Tokenizer",
        "vocab_size": tokenizer.vocab_size,
        "add_bos_token": tokenizer.settings.add_bos,
        "add_eos_token": tokenizer.settings.add_eos,
        "bos_token": _piece(tokenizer, tokenizer.bos_id),
        "eos_token": _piece(tokenizer, tokenizer.eos_id),
        "pad_token": _piece(tokenizer, tokenizer.pad_id),
        "unk_token": _piece(tokenizer, tokenizer.unk_id),
        "bos_token_id": _id(tokenizer.bos_id),
        "eos_token_id": _id(tokenizer.eos_id),
        "pad_token_id": _id(tokenizer.pad_id),
        "chat_template": templates.get("default"),
    }


def _piece(tokenizer: Tokenizer, id: int) -> str | None:
    return tokenizer.piece(id) if id >= 0 else None


def _id(id: int) -> int | None:
    return id if id >= 0 else None
