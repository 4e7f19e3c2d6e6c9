"""Who gets a slot and who makes room, as pure functions: priority, shares of people, new ideas before long runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Wish:
    """A trial that would run to rung `target` of its study."""

    trial: int
    who: str
    priority: int
    target: int
    bonus: bool = False
    alone: bool = False  # a guest who may run where nobody else does: the best of its rung


@dataclass(frozen=True)
class Busy:
    """An attempt in a slot; `seconds` since it was started."""

    attempt: int
    trial: int
    who: str
    priority: int
    target: int
    bonus: bool
    leaving: bool
    seconds: float


Shares = Mapping[str, tuple[float, float]]  # who: (weight, slot seconds used)


def order(wishes: Sequence[Wish], busy: Sequence[Busy], shares: Shares, promotions_first: bool) -> list[Wish]:
    """Wishes in the order in which they get slots.

    Work with a place before the bonus queue; then priority; then whoever has the fewest slots for their weight and has
    used the least; then new ideas, which are short, before promoted ones, unless many of those wait."""

    def key(w: Wish) -> tuple[object, ...]:
        weight, used = shares.get(w.who, (1.0, 0.0))
        slots = sum(b.who == w.who and not b.leaving for b in busy)
        new_first = (w.target > 0) != promotions_first
        return w.bonus, -w.priority, slots / weight, used / weight, new_first, -w.target, w.trial

    return sorted(wishes, key=key)


def make_room(
    wish: Wish, busy: Sequence[Busy], shares: Shares, promotions_first: bool, quantum: float
) -> tuple[Busy, str] | None:
    """Who is asked to leave for a wish that finds no slot, and why; None where nobody is.

    The bonus queue makes room for everyone, lower priority for higher. A person's new idea takes the slot of a promoted
    trial that has had it for `quantum` seconds, if the person has none at the first rung: so anyone starts at once."""
    if wish.bonus:
        return None
    stays = [b for b in busy if not b.leaving]

    def cost(b: Busy) -> tuple[object, ...]:
        weight, used = shares.get(b.who, (1.0, 0.0))
        return not b.bonus, b.priority, -used / weight, -b.target, b.seconds

    for victim in sorted(stays, key=cost):
        if victim.bonus:
            return victim, f"trial {wish.trial} has a place, this one was a guest in an idle slot"
        if victim.priority < wish.priority:
            return victim, f"trial {wish.trial} of {wish.who} is more urgent"
        newcomer = wish.target == 0 and not any(b.who == wish.who and b.target == 0 for b in busy)
        equal = victim.priority == wish.priority and victim.target > 0 and victim.seconds >= quantum
        if newcomer and equal and not promotions_first:
            return victim, f"trial {wish.trial} of {wish.who} is new and short"
    return None
