"""What a token costs: dated price lists with weekday and time windows, in whole numbers.

A price is given in a currency per million tokens as a decimal string and kept in nano-units per million
tokens ("0.0028" is 2,800,000), so no price and no cost is ever a float. A request is priced at the moment it
arrived; its cost is rounded half up to one nano-unit, once.

    currency = "USD"
    [[price]]
    model = "*"                       # or a model's name; the last match of the newest date wins
    since = "2026-09-10T00:00:00Z"
    hit = "0.003"                     # prompt tokens found in the prefix cache
    miss = "0.15"                     # prompt tokens computed
    output = "0.60"                   # completion tokens, reasoning included
    [[price.window]]                  # a peak: twice the price on weekdays, 01:00 to 04:00 UTC
    days = ["mon", "tue", "wed", "thu", "fri"]
    start = "01:00"
    end = "04:00"                     # at or before start: runs past midnight, and belongs to the day it
    began factor = "2" except = ["2026-10-01"]           # UTC dates that the window leaves out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any

from rorqual.config import read_tree
from rorqual.errors import ConfigError

NANO = 10**9
_MILLION = 10**6
_MOST = 10**9 * NANO  # a balance of several still fits the 63 bits of a database's number
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@dataclass(frozen=True)
class Rates:
    """Nano-units per million tokens of each class."""

    hit: int = 0
    miss: int = 0
    output: int = 0

    def cost(self, hit: int, miss: int, output: int) -> int:
        """Nano-units for so many tokens, rounded half up."""
        return (hit * self.hit + miss * self.miss + output * self.output + _MILLION // 2) // _MILLION

    def scaled(self, factor: Fraction) -> Rates:
        """These rates times `factor`, each rounded half up."""

        def times(rate: int) -> int:
            return (2 * rate * factor.numerator + factor.denominator) // (2 * factor.denominator)

        return Rates(times(self.hit), times(self.miss), times(self.output))


@dataclass(frozen=True)
class Window:
    """A part of the week with another price. All times are UTC."""

    start: time
    end: time
    factor: Fraction
    days: frozenset[int] = frozenset(range(7))
    without: frozenset[date] = frozenset()

    def holds(self, moment: datetime) -> bool:
        """Whether `moment` (UTC) lies in the window, which belongs to the day on which it began."""
        clock, day = moment.time(), moment.date()
        if self.start < self.end:
            return self.start <= clock < self.end and self._on(day)
        if clock >= self.start:
            return self._on(day)
        return clock < self.end and self._on(day - timedelta(days=1))

    def _on(self, day: date) -> bool:
        return day.weekday() in self.days and day not in self.without


@dataclass(frozen=True)
class Price:
    """The rates of a model (or of all: "*") from a date on."""

    model: str
    since: datetime
    rates: Rates
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True)
class PriceList:
    """All prices in one currency. Without prices every token is free."""

    currency: str = "USD"
    prices: tuple[Price, ...] = ()

    def rates(self, model: str, moment: datetime, base: str | None = None) -> Rates:
        """What holds for `model` at `moment`: its own prices before those of its base (of an adapter) before "*", the
        newest that has begun; then the first window that holds.
        """
        for name in (model, base, "*"):
            begun = [p for p in self.prices if p.model == name and p.since <= moment]
            if begun:
                newest = max(begun, key=lambda p: p.since)
                for window in newest.windows:
                    if window.holds(moment):
                        return newest.rates.scaled(window.factor)
                return newest.rates
        return Rates()

    @classmethod
    def load(cls, file: Path) -> PriceList:
        """Read a TOML or JSON price list; a wrong key or value is a `ConfigError` naming it."""
        return cls.parse(read_tree(file), str(file))

    @classmethod
    def parse(cls, tree: Mapping[str, Any], where: str = "prices") -> PriceList:
        """A price list from plain values."""
        _known(tree, {"currency", "price"}, where)
        entries = tree.get("price", [])
        if not isinstance(entries, list):
            raise ConfigError(f"{where}: price must be a list of tables ([[price]])")
        prices = tuple(_price(entry, f"{where}: price[{i}]") for i, entry in enumerate(entries))
        return cls(str(tree.get("currency", "USD")), prices)


def nano(text: str, where: str) -> int:
    """A decimal string of a currency as nano-units: "0.15" is 150,000,000."""
    try:
        amount = Decimal(text) * NANO
        whole = int(amount)
    except (InvalidOperation, ValueError, TypeError, OverflowError):
        raise ConfigError(f"{where}={text!r}: must be a decimal number in quotes") from None
    if amount != whole:
        raise ConfigError(f"{where}={text!r}: finer than a nano-unit (nine decimals)")
    if abs(whole) > _MOST:
        raise ConfigError(f"{where}={text!r}: must be at most a billion")
    return whole


def decimal_text(amount: int, places: int = 2) -> str:
    """Nano-units as a decimal string with at least `places` decimals and no more than it needs."""
    sign, amount = ("-", -amount) if amount < 0 else ("", amount)
    whole, rest = divmod(amount, NANO)
    digits = f"{rest:09d}".rstrip("0").ljust(places, "0")
    return f"{sign}{whole}.{digits}"


def _known(tree: Mapping[str, Any], names: set[str], where: str) -> None:
    unknown = set(tree) - names
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {sorted(unknown)[0]!r}; known keys: {', '.join(sorted(names))}"
        )


def _price(entry: Any, where: str) -> Price:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: must be a table")
    _known(entry, {"model", "since", "hit", "miss", "output", "window"}, where)
    missing = {"miss", "output"} - set(entry)
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(sorted(missing))}")
    miss = nano(entry["miss"], f"{where}.miss")
    hit = nano(entry["hit"], f"{where}.hit") if "hit" in entry else miss
    output = nano(entry["output"], f"{where}.output")
    if min(hit, miss, output) < 0:
        raise ConfigError(f"{where}: a price must not be negative")
    listed = _list(entry, "window", where)
    windows = tuple(_window(w, f"{where}.window[{i}]") for i, w in enumerate(listed))
    since = _moment(entry.get("since", "1970-01-01T00:00:00Z"), f"{where}.since")
    return Price(str(entry.get("model", "*")), since, Rates(hit, miss, output), windows)


def _window(entry: Any, where: str) -> Window:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: must be a table")
    _known(entry, {"days", "start", "end", "factor", "except"}, where)
    days = [str(d).lower()[:3] for d in _list(entry, "days", where, DAYS)]
    wrong = [d for d in days if d not in DAYS]
    if wrong:
        raise ConfigError(f"{where}.days={wrong[0]!r}: must be among {', '.join(DAYS)}")
    try:
        start, end = time.fromisoformat(entry["start"]), time.fromisoformat(entry["end"])
        without = frozenset(date.fromisoformat(str(d)) for d in _list(entry, "except", where))
        factor = Fraction(str(entry["factor"]))
    except KeyError as e:
        raise ConfigError(f"{where}: missing {e.args[0]}") from None
    except (ValueError, TypeError, ZeroDivisionError) as e:
        raise ConfigError(f"{where}: {e}") from None
    for name, clock in (("start", start), ("end", end)):
        if clock.tzinfo is not None:
            raise ConfigError(
                f"{where}.{name}={entry[name]!r}: write it without an offset; all times are UTC"
            )
    if factor < 0:
        raise ConfigError(f"{where}.factor={entry['factor']!r}: must be 0 or more")
    return Window(start, end, factor, frozenset(DAYS.index(d) for d in days), without)


def _list(entry: Mapping[str, Any], name: str, where: str, default: Sequence[Any] = ()) -> Sequence[Any]:
    value = entry.get(name, default)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}.{name}={value!r}: must be a list")
    return value


def _moment(value: Any, where: str) -> datetime:
    try:
        moment = (
            value
            if isinstance(value, datetime)
            else datetime.fromisoformat(str(value).replace("Z", "+00:00"))
        )
    except ValueError:
        raise ConfigError(f"{where}={value!r}: must be a date and time like 2026-09-10T00:00:00Z") from None
    return moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment.astimezone(timezone.utc)
