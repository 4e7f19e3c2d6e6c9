"""What followed a sequence's last tokens when they stood in it before, kept up as the sequence grows."""

from __future__ import annotations

from collections.abc import Sequence


class Lookup:
    """The running form of `rorqual.model.memory.followers` for one sequence: a step costs what its new tokens cost."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._known: list[int] = []  # tokens that are looked up; guesses that were wrong are taken back
        self._found: list[tuple[int, int]] = []
        self._last: dict[tuple[int, ...], int] = {}  # where each run of tokens ended last
        self._undo: list[list[tuple[tuple[int, ...], int | None]]] = []  # what each token's entry replaced

    def find(self, tokens: Sequence[int], start: int, end: int) -> tuple[list[int], list[int]]:
        """Followers and match lengths of the tokens from `start` to `end`."""
        same = min(start, len(self._known))
        while same < min(end, len(self._known)) and self._known[same] == tokens[same]:
            same += 1
        while len(self._known) > same:
            self._forget()
        for at in range(len(self._known), end):
            self._enter(tokens, at)
        found = self._found[start:end]
        return [token for token, _ in found], [length for _, length in found]

    def _enter(self, tokens: Sequence[int], at: int) -> None:
        token, length = tokens[0], 0
        replaced: list[tuple[tuple[int, ...], int | None]] = []
        for n in range(1, min(self.longest, at + 1) + 1):
            run = tuple(tokens[at - n + 1 : at + 1])
            earlier = self._last.get(run)
            if earlier is not None:
                token, length = tokens[earlier + 1], n
            replaced.append((run, earlier))
            self._last[run] = at
        self._known.append(tokens[at])
        self._found.append((token, length))
        self._undo.append(replaced)

    def _forget(self) -> None:
        self._known.pop()
        self._found.pop()
        for run, earlier in self._undo.pop():
            if earlier is None:
                del self._last[run]
            else:
                self._last[run] = earlier
