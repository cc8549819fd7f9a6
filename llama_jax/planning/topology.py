"""Topologies: a number of chips and how they are connected.

TPU topologies are written as in jax and libtpu (`v5e:4x4`, `v5p:2x2x1`). GPU topologies
are the number of GPUs of one host (`h100:8`), or hosts by GPUs per host (`h100:2x8`).
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping

import jax

from llama_jax.errors import MeshError, did_you_mean
from llama_jax.planning.chips import CHIPS, Chip
from llama_jax.runtime import MESH_AXES

_SLICES = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: (
        (1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8),
        (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16), (16, 16, 16),
    ),
}  # fmt: skip
_GPU_HOSTS = ((1, 1), (1, 2), (1, 4), (1, 8), *((2**n, 8) for n in range(1, 8)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A number of chips of one kind, connected in a shape.

    Attributes:
      chip: the kind of chip.
      shape: the sides of a torus; for GPUs, (hosts, GPUs per host).
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        shape = self.shape
        if self.chip.links == "host" and shape[0] == 1:
            shape = shape[1:]
        return f"{self.chip.name}:{'x'.join(map(str, shape))}"

    def larger(self) -> Iterator["Topology"]:
        """Larger topologies of the same chip that exist, smallest first."""
        torus = self.chip.links == "torus"
        shapes = _SLICES[self.chip.dimensions] if torus else _GPU_HOSTS
        for shape in shapes:
            if math.prod(shape) > self.chips:
                yield Topology(chip=self.chip, shape=shape)


def parse_topology(text: str) -> Topology:
    """Parse `v5e:16x16`, `v5p:4x4x4`, `h100:8` or `h100:2x8`; `t4` is a single chip.

    Raises:
      MeshError: no chip has this name, or the shape does not suit it.

    >>> topology = parse_topology("v5e:4x4")
    >>> topology.chips, topology.chip.limit_bytes
    (16, 16911433728)
    """
    name, colon, shape = text.partition(":")
    chip = CHIPS.get(name)
    if chip is None:
        raise MeshError(
            f"topology {text!r}: no chip is called {name!r}, only {', '.join(CHIPS)}"
            f"{_suggest(text)}"
        )
    parts = shape.split("x") if colon else ["1"] * chip.dimensions
    are_sizes = all(part.isdecimal() and int(part) for part in parts)
    if chip.links == "host":
        parts = ["1", *parts] if len(parts) == 1 else parts
        example = f"{name}:8, or {name}:2x8 for two hosts"
    else:
        example = f"{name}:{'x'.join('4' * chip.dimensions)}"
    if not are_sizes or len(parts) != chip.dimensions:
        raise MeshError(
            f"topology {text!r}: {shape!r} is not a shape of {name}; write {example}"
        )
    return Topology(chip=chip, shape=tuple(map(int, parts)))


def _suggest(text: str) -> str:
    """What was meant by a name such as v5e-8, v5litepod-8, 8xH100 or A100."""
    text = text.lower().replace("litepod", "e")
    for name, chip in CHIPS.items():
        number = re.sub(rf"^{name}[-x:_ ]?(?=\d+$)|(?<=\d)[x ]?{name}$", "", text)
        if not number.isdecimal() or number == text:
            continue
        chips = int(number)
        if chip.name in ("v4", "v5p"):  # Google Cloud counts their cores
            chips //= 2
        one = Topology(
            chip=chip, shape=(1,) * (2 if chip.links == "host" else chip.dimensions)
        )
        for topology in (one, *one.larger()):
            if topology.chips == chips:
                return f"; did you mean {str(topology)!r}?"
    return did_you_mean(text.partition(":")[0], CHIPS)


def local_topology() -> Topology:
    """Describe the devices of this machine.

    A CPU is a chip with its share of the host's memory and unknown rates. So is an
    accelerator that is not in the table; jax may report its memory.
    """
    devices = jax.devices()
    first = devices[0]
    for chip in sorted(CHIPS.values(), key=lambda chip: -max(map(len, chip.kinds))):
        if first.device_kind.startswith(chip.kinds):
            break
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if first.platform == "cpu":
            memory //= len(devices)
        chip = Chip(
            name=first.platform,
            kinds=(first.device_kind,),
            hbm_bytes=memory,
            limit_bytes=memory,
            hbm_bandwidth=None,
            flops={},
            links="host",
            link_bandwidth=0.0,
            flash=False,
        )
    stats = first.memory_stats() if first.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        chip = dataclasses.replace(chip, limit_bytes=int(stats["bytes_limit"]))
    coordinates = [getattr(device, "coords", None) for device in devices]
    shape: tuple[int, ...] = (1, len(devices))
    if chip.links == "torus":
        extents = [
            max(axis) + 1 for axis in zip(*filter(None, coordinates), strict=True)
        ]
        shape = tuple(extents[: chip.dimensions])
    elif first.platform != "cpu":
        hosts = len({device.process_index for device in devices})
        shape = (hosts, len(devices) // hosts)
    return Topology(chip=chip, shape=shape)


def axis_bandwidths(topology: Topology, mesh: Mapping[str, int]) -> dict[str, float]:
    """Bytes/s that each chip can receive along each mesh axis, all axes at once.

    The last mesh axis is laid along the last dimension of the topology. An axis that
    takes a whole ring has two links per chip, otherwise one (the end of a line has no
    second neighbour). An axis across hosts is limited by the network, which all chips
    of a host on that axis share.
    """
    chip, remaining = topology.chip, list(topology.shape)
    rates = {}
    for axis in reversed(MESH_AXES):
        size, links, inside = mesh.get(axis, 1), 0, 1
        for index in reversed(range(len(remaining))):
            part = math.gcd(size, remaining[index])
            if part == 1:
                continue
            size, remaining[index] = size // part, remaining[index] // part
            ring = part == topology.shape[index] and part % chip.ring == 0
            links += 2 if ring else 1
            if index == len(remaining) - 1:
                inside = part
        if chip.links == "torus":
            rates[axis] = max(links, 1) * chip.link_bandwidth
        elif mesh.get(axis, 1) == inside:
            rates[axis] = chip.link_bandwidth
        else:
            rates[axis] = min(chip.link_bandwidth, inside * chip.network_bandwidth)
    return rates
