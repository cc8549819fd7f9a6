"""The model that a benchmark runs: a preset by name, or a shape by letters."""

import re

from llama_jax.config import PRESETS, LlamaConfig, preset
from llama_jax.errors import ConfigError

DEFAULT = "L12,D768,N12,F2048,V32000"
"""134 million parameters."""

_LETTERS = {
    "L": "num_layers",
    "D": "embed_dim",
    "N": "num_heads",
    "K": "num_kv_heads",
    "H": "head_dim",
    "F": "mlp_dim",
    "V": "vocab_size",
}


def parse_model(text: str, max_seq_len: int) -> LlamaConfig:
    """The configuration called `text`, or of the shape that it spells.

    Args:
      text: a preset's name, or letters with sizes: `L12,D768,N12,F2048,V32000`; K is N
        and H is D / N where they are not given. With `tied`, the embedding is the
        output head too.
      max_seq_len: of a shape; a preset has its own.

    Raises:
      ConfigError: it is neither, or its sizes contradict each other.
    """
    if text in PRESETS:
        return preset(text)
    if not re.match(r"[A-Z]\d", text):
        return preset(text)  # which knows how to refuse a name
    sizes: dict[str, int] = {}
    parts = text.split(",")
    tied = parts[-1] == "tied"
    for part in parts[: -1 if tied else None]:
        letter, size = part[:1], part[1:]
        if letter not in _LETTERS or not size.isdecimal() or letter in sizes:
            raise ConfigError(
                f"--model {text}: {part!r} is not understood; write each of "
                f"{', '.join(_LETTERS)} once with its size, as in {DEFAULT}, and "
                "`tied` last where the embedding is the output head too"
            )
        sizes[letter] = int(size)
    if missing := [letter for letter in "LDNFV" if letter not in sizes]:
        raise ConfigError(f"--model {text}: lacks {', '.join(missing)}")
    sizes.setdefault("K", sizes["N"])
    sizes.setdefault("H", sizes["D"] // max(sizes["N"], 1))
    return LlamaConfig(
        **{_LETTERS[letter]: size for letter, size in sizes.items()},
        max_seq_len=max_seq_len,
        rope_theta=1e4,
        rope_scaling=None,
        norm_eps=1e-5,
        tied_embeddings=tied,
    )
