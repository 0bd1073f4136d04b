"""Counts the collectives of a compiled program in its HLO text.

A collective in a loop counts once per trip. The same branch counts in all conditionals, the first
or the second, whichever costs more: LoFT's branches correspond to the two active factors. The text
shows an asynchronous collective several times (start, intermediate steps, end) with one channel;
it counts once.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8}
_BYTES |= {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(
    r"(body|condition|calls|branch_computations|\w+_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """A collective of a program.

    Attributes:
      kind: one of `KINDS`.
      shapes: its arrays on one device, as in the text.
      bytes: size of the whole array that a group gathers, sums or exchanges.
      group: the number of devices in a group.
      trips: the number of runs per step.
      source: the name of the operation, with its `jax.named_scope`; if the compiler inserted the
        collective, the name of the enclosing loop or conditional.
    """

    kind: str
    shapes: str
    bytes: int
    group: int
    trips: int
    source: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends per step if the devices of a group form a ring."""
        if self.kind == "collective-permute":
            return self.trips * self.bytes
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.trips * self.bytes * (self.group - 1) / self.group


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program that involve several devices."""
    bodies, entry = _computations(text)
    return max((_of_branch(bodies, entry, branch) for branch in (0, 1)), key=total_sent)


def _of_branch(bodies: dict[str, list[str]], entry: str, branch: int) -> list[Collective]:
    found: dict[str, tuple[bool, Collective]] = {}
    for channel, starts, collective in _walk(bodies, entry, 1, True, "", branch):
        known = found.get(channel)
        # Intermediate steps may be in an inner loop; the start has the right number of trips.
        better = known is None or (starts, collective.trips) > (known[0], known[1].trips)
        if collective.group > 1 and better:
            found[channel] = starts, collective
    return [collective for _, collective in found.values()]


def total_sent(of: Iterable[Collective]) -> float:
    """Bytes that a device sends per step for these collectives."""
    return sum(collective.sent for collective in of)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line.startswith("  "):
            lines.append(line)
    return bodies, entry


def _walk(
    bodies: dict[str, list[str]], name: str, trips: int, starts: bool, around: str, branch: int
) -> Iterator[tuple[str, bool, Collective]]:
    """Yields each collective with its channel, and whether the collective starts there."""
    for number, line in enumerate(bodies.get(name, ())):
        named = re.search(r'op_name="([^"]*)"', line)
        source = named[1] if named else around
        if match := _COLLECTIVE.search(line):
            channel = re.search(r"channel_id=(\d+)", line)
            key = channel[1] if channel else f"{name}:{number}"
            yield key, starts, _collective(match, line, trips, source)
        called = _called(line)
        if "branch_computations" in called or "true_computation" in called:
            callees = [x for role, names in called.items() if role != "calls" for x in names]
            taken = callees[min(branch, len(callees) - 1)]
            yield from _walk(bodies, taken, trips, starts, source, branch)
            continue
        inside = starts and (" fusion(" not in line or "%async-collective-start" in line)
        for role, names in called.items():
            count = trips * _trip_count(bodies, line) if role == "body" else trips
            for callee in names:
                yield from _walk(bodies, callee, count, inside, source, branch)


def _called(line: str) -> dict[str, list[str]]:
    """The computations that an instruction calls, by role."""
    return {role: re.findall(r"[\w.\-]+", names) for role, names in _CALLED.findall(line)}


def _trip_count(bodies: dict[str, list[str]], line: str) -> int:
    """The trips of a loop: as annotated, or from the limit and the step of its counter.

    The result is 1 if neither is known, so that counts are never too large.
    """
    if match := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(match[1])
    called = _called(line)
    condition, body = ("\n".join(bodies[called[role][0]]) for role in ("condition", "body"))
    limits = re.findall(r"[su]32\[\]\S* constant\((\d+)\)", condition)
    return -(-int(limits[0]) // _step(condition, body)) if len(limits) == 1 else 1


def _step(condition: str, body: str) -> int:
    """The increment of a loop's counter; more than 1 in a loop that the compiler unrolled."""
    counter = re.search(r"get-tuple-element\(.*?\), index=(\d+)", condition)
    result = re.search(r"ROOT .* tuple\((.*?)\)(?:,|$)", body, re.MULTILINE)
    if not counter or not result:
        return 1
    names = re.findall(r"%([\w.\-]+)", result[1])
    last = re.escape(names[int(counter[1])])
    added = re.search(rf"%{last} = \S+ add\(%[\w.\-]+, %([\w.\-]+)\)", body)
    found = added and re.search(rf"%{re.escape(added[1])} = \S+ constant\((\d+)\)", body)
    return int(found[1]) if found else 1


def _collective(match: re.Match[str], line: str, trips: int, source: str) -> Collective:
    kind, start = match[2], match[3]
    arrays = _ARRAY.findall(match[1])
    sizes = [
        _BYTES.get(dtype, 0) * math.prod(int(size) for size in shape.split(",") if size)
        for dtype, shape in arrays
    ]
    if start and kind == "all-gather":  # operands, then results
        sizes = sizes[len(sizes) // 2 :]
    elif start and kind == "collective-permute":  # operand, result, two counters
        sizes = sizes[:1]
    group = _group_size(line)
    whole = sum(sizes) * (group if kind == "reduce-scatter" else 1)
    shapes = " ".join(f"{dtype}[{shape}]" for dtype, shape in arrays)
    return Collective(kind, shapes, whole, group, trips, source)


def _group_size(line: str) -> int:
    """The number of devices in a group, in each of HLO's notations."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'?(\w+)'?=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"\w+", match[2]))
    return 2 if "source_target_pairs=" in line else 1
