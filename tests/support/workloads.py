"""Workloads that the tests of planning share."""

from typing import Any

import jax
import pytest

from llama_jax.config import LlamaConfig
from llama_jax.model.presets import parse_model
from llama_jax.planning.workload import Workload
from llama_jax.runtime import MESH_AXES

GROUPED = parse_model("L2,D512,N8,K4,F1408,V2048", 64)
"""A model whose key heads are half as many as its query heads."""

ONE_CHIP = dict.fromkeys(MESH_AXES, 1)

eight_devices = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs eight devices (tests/conftest.py)"
)


def workload(config: LlamaConfig = GROUPED, **choices: Any) -> Workload:
    """Training of eight rows of 64 tokens, with some choices changed."""
    defaults: dict[str, Any] = {"task": "train", "batch": 8, "seq": 64}
    return Workload(config=config, **(defaults | choices))
