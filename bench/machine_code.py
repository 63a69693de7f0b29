"""The control flow of compiled kernels, read from their disassembly: SASS (NVIDIA) and amdgcn (AMD)."""

from __future__ import annotations

import re
from functools import cached_property
from typing import NamedTuple

TENSOR_CORE = re.compile(r"HGMMA|HMMA|UTCHMMA|v_s?mfma")
# Loads, stores and reductions of memory, by SASS.
ACCESS = re.compile(r"(LD|ST|LDG|STG|LDS|STS|LDGSTS|LDSM|STSM|RED|REDG|ATOMG|ATOM|UTMA\w*)\b")
# What a path through the loop must meet to be that of a tile near the diagonal: products, loads, reductions.
WORK = re.compile(r"HGMMA|HMMA|UTCHMMA|(LDG|LD|REDG?|ATOMG?)\b|v_s?mfma|(global|buffer|flat)_(load|atomic)")


class Instruction(NamedTuple):
    op: str
    target: int | None  # index of the instruction it may go to
    falls_through: bool


def read_sass(text: str) -> list[Instruction]:
    rows = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", text, re.M)
    index = {int(address, 16): n for n, (address, *_) in enumerate(rows)}
    made = []
    for _, predicate, op, rest in rows:
        target, falls = None, True
        if re.match(r"U?BRA\b|U?BRA\.|JMP\b", op):
            address = re.search(r"0x([0-9a-f]+)", rest)
            target = index.get(int(address[1], 16)) if address else None
            # A condition stands in front (@P0), or before the address (BRA.U UP0, BRA.DIV UR4).
            falls = bool(predicate) or "," in rest.split("0x")[0]
        elif op.split(".")[0] in ("EXIT", "RET"):
            falls = bool(predicate)
        made.append(Instruction(op, target, falls))
    return made


def read_amdgcn(text: str) -> list[Instruction]:
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.split(".section", 1)[0].splitlines():
        line = line.split(";")[0].strip()
        if label := re.fullmatch(r"([.\w$]+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"([a-z]\w+)\s*(.*)", line):
            lines.append((instruction[1], instruction[2]))
    return [
        Instruction(op, labels.get(rest) if op.startswith(("s_branch", "s_cbranch")) else None,
                    op not in ("s_branch", "s_endpgm", "s_setpc_b64"))
        for op, rest in lines
    ]  # fmt: skip


class Code:
    """The control flow of a kernel: `loop` is its innermost loop that holds products."""

    def __init__(self, instructions: list[Instruction]):
        self.instructions = instructions
        self.successors: list[list[int]] = []
        for n, (_, target, falls) in enumerate(instructions):
            after = [n + 1] if falls and n + 1 < len(instructions) else []
            self.successors.append(after + ([target] if target is not None else []))
        self.predecessors: list[list[int]] = [[] for _ in instructions]
        self.order, self.back = self._depth_first()
        for n in self.order:
            for m in self.successors[n]:
                self.predecessors[m].append(n)

    def _depth_first(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Reachable instructions in reverse postorder; the edges that close a loop."""
        done: list[int] = []
        back = []
        state = {0: 1}
        stack = [(0, iter(self.successors[0] if self.successors else []))]
        while stack:
            n, rest = stack[-1]
            for m in rest:
                if m not in state:
                    state[m] = 1
                    stack.append((m, iter(self.successors[m])))
                    break
                if state[m] == 1:
                    back.append((n, m))
            else:
                state[n] = 2
                done.append(n)
                stack.pop()
        return done[::-1], back

    def _body(self, latch: int, header: int) -> set[int]:
        body, todo = {header}, [latch]
        while todo:
            n = todo.pop()
            if n not in body:
                body.add(n)
                todo += self.predecessors[n]
        return body

    @cached_property
    def loop(self) -> tuple[int, set[int]] | None:
        """(first instruction, all instructions) of the smallest loop with products; several ways back are one loop."""
        bodies: dict[int, set[int]] = {}
        for latch, header in self.back:
            bodies.setdefault(header, set()).update(self._body(latch, header))
        inside = [(h, b) for h, b in bodies.items() if any(TENSOR_CORE.match(self.instructions[n].op) for n in b)]
        if not inside:  # products without tensor cores: the largest loop that contains no other large one
            inside = [(h, b) for h, b in bodies.items() if len(b) > 40]
        return min(inside, key=lambda loop: len(loop[1]), default=None)

    def shortest(self, near: bool) -> list[str]:
        """Opcodes of the shortest way once round the loop; `near`: of those that meet the most of WORK."""
        if self.loop is None:
            return []
        header, body = self.loop
        best: dict[int, tuple[int, int]] = {header: (0, 0)}  # instruction -> (minus work, length) before it
        came: dict[int, int] = {}
        ends = {}
        for n in self.order:
            if n not in best or n not in body:
                continue
            work, length = best[n]
            work -= int(near and bool(WORK.match(self.instructions[n].op)))
            for m in self.successors[n]:
                if m == header:
                    ends[n] = (work, length + 1)
                elif m in body and (n, m) not in self.back and (m not in best or (work, length + 1) < best[m]):
                    best[m], came[m] = (work, length + 1), n
        n = min(ends, key=lambda end: ends[end])
        way = [n]
        while n != header:
            n = came[n]
            way.append(n)
        return [self.instructions[n].op for n in reversed(way)]
