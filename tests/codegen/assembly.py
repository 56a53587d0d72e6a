"""Loops of an assembler listing, NVIDIA's or AMD's.

Natural loops, from dominators: a compiler may lay the blocks of a loop out in any order, so that "from the target of a backward
branch to the branch" is neither all of the loop nor only it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_LABEL = re.compile(r"(\.L[\w$]+):")
_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(\S.*)")
_SASS_JUMP = re.compile(r"^(@!?U?P\w+ )?BRA((?:\.\w+)*) (.*)`\((\.L\w+)\)")
_AMD = re.compile(r"\t([a-z]\w+(?:\s.*)?)$")
_AMD_JUMP = re.compile(r"^s_(c?)branch\S*\s+(\.L\w+)")


@dataclass
class Listing:
    """Instructions in order; of those that jump, where to; and those after which control never just goes on."""

    instructions: list[str] = field(default_factory=list)
    jumps: dict[int, str] = field(default_factory=dict)
    ends: set[int] = field(default_factory=set)
    labels: dict[str, int] = field(default_factory=dict)

    def add(self, instruction: str, jump: str | None, end: bool) -> None:
        at = len(self.instructions)
        if jump is not None:
            self.jumps[at] = jump
        if end:
            self.ends.add(at)
        self.instructions.append(instruction)


def sass(text: str) -> Listing:
    """The listing of `nvdisasm -c`."""
    listing = Listing()
    for line in map(str.strip, text.splitlines()):
        if label := _LABEL.match(line):
            listing.labels[label[1]] = len(listing.instructions)
        elif match := _SASS.match(line):
            instruction = re.sub(r"\s+", " ", match[1])
            jump = _SASS_JUMP.match(instruction)
            # A condition is a predicate in front, a modifier such as .DIV, or a predicate before the target.
            always = jump is not None and not jump[1] and ".DIV" not in jump[2] and not jump[3].strip()
            stops = re.match(r"(EXIT|RET|BRX|JMX)\b", instruction) is not None
            listing.add(instruction, jump[4] if jump else None, always or stops)
    return listing


def amdgcn(text: str) -> Listing:
    """The listing of AMD's assembler text."""
    listing = Listing()
    for line in text.splitlines():
        if label := _LABEL.match(line):
            listing.labels[label[1]] = len(listing.instructions)
        elif match := _AMD.match(line.partition(";")[0].rstrip()):
            jump = _AMD_JUMP.match(match[1])
            listing.add(match[1], jump[2] if jump else None, match[1].startswith("s_endpgm") or bool(jump and not jump[1]))
    return listing


def _blocks(listing: Listing) -> tuple[dict[int, int], dict[int, set[int]]]:
    """Basic blocks, first instruction -> one past the last, and which blocks may follow each."""
    size = len(listing.instructions)
    targets = {at: listing.labels[label] for at, label in listing.jumps.items() if listing.labels.get(label, size) < size}
    after = {at + 1 for at in targets.keys() | listing.ends if at + 1 < size}
    starts = sorted({0} | set(targets.values()) | after)
    blocks = dict(zip(starts, [*starts[1:], size], strict=True))
    follow: dict[int, set[int]] = {}
    for start, stop in blocks.items():
        last = stop - 1
        follow[start] = {targets[last]} if last in targets else set()
        if last not in listing.ends and stop in blocks:
            follow[start].add(stop)
    return blocks, follow


def _dominators(follow: dict[int, set[int]]) -> dict[int, set[int]]:
    """The blocks that every way from the entry to a block goes through; unreachable blocks are left out."""
    reached, stack = {0}, [0]
    while stack:
        new = follow[stack.pop()] - reached
        reached |= new
        stack += new
    before = {block: {other for other in reached if block in follow[other]} for block in reached}
    dominators = {block: set(reached) for block in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            new = set.intersection(*(dominators[other] for other in before[block])) | {block}
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators


def loops(listing: Listing) -> list[list[str]]:
    """The instructions of every natural loop, inner loops included."""
    if not listing.instructions:
        return []
    blocks, follow = _blocks(listing)
    dominators = _dominators(follow)
    bodies: dict[int, set[int]] = {}
    for block, dominating in dominators.items():
        for head in follow[block] & dominating:  # a way back to a block that every way here came through
            body, stack = bodies.setdefault(head, {head}), [block]
            while stack:
                member = stack.pop()
                if member not in body:
                    body.add(member)
                    stack += [other for other in dominators if member in follow[other]]
    return [
        [listing.instructions[at] for block in sorted(body) for at in range(block, blocks[block])] for body in bodies.values()
    ]
