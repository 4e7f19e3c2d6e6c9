"""`rorqual serve`, `keys`, `usage` and `price`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from rorqual.engine.config import EngineConfig
from rorqual.errors import ConfigError
from rorqual.server.costing import Machine, measure, per_million, price_list
from rorqual.server.ledger import Key, Ledger
from rorqual.server.price import PriceList, decimal_text, nano
from rorqual.server.settings import Settings

if TYPE_CHECKING:
    from rorqual.server.models import Served
    from rorqual.server.service import Service


def default_ledger() -> Path:
    """`$RORQUAL_HOME/ledger.db`, or in `~/.rorqual`."""
    return Path(os.environ.get("RORQUAL_HOME", "~/.rorqual")).expanduser() / "ledger.db"


@dataclass(frozen=True)
class ServeOptions:
    """Serve a model behind an OpenAI-, DeepSeek- and Anthropic-compatible API, with a chat page at /."""

    model: tyro.conf.Positional[str | None] = None
    """Model folder or GGUF file."""
    name: str | None = None
    """Name under which the model is asked for; by default that of its folder."""
    also: tuple[str, ...] = ()
    """Further models: NAME=PATH …"""
    alias: tuple[str, ...] = ()
    """Other names for models: ALIAS=NAME …"""
    scripted: Path | None = None
    """Answer from this file instead of a model."""
    host: str = "127.0.0.1"
    """Address to listen on; beyond this machine only with a key made."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    ledger: Path = field(default_factory=default_ledger)
    """File of keys, balances and charges."""
    prices: Path | None = None
    """Price list (TOML or JSON); without one every token is free."""
    log_level: Literal["debug", "info", "warning"] = "info"
    """How much goes to standard error."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights; auto: as they are stored."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)


def serve(argv: Sequence[str]) -> int:
    """Run the server until it is told to stop."""
    options = tyro.cli(ServeOptions, args=list(argv), prog="rorqual serve")
    from rorqual.server.run import listen, log_to_stderr, serve_forever

    log_to_stderr(options.log_level)
    host = f"[{options.host}]" if ":" in options.host else options.host
    with listen(options.host, options.port) as sock:
        service = build_service(options)
        port = sock.getsockname()[1]

        def ready() -> None:
            door = "open to this machine, no key needed" if service.open_door else "a key is needed"
            print(
                f"Rorqual serves {', '.join(service.models.names())} at http://{host}:{port}/ ({door})",
                flush=True,
            )

        serve_forever(service, sock, ready)
    return 0


def build_service(options: ServeOptions) -> Service:
    """Models, ledger and prices of the options; refuses an open door to other machines."""
    from rorqual.server.models import Models
    from rorqual.server.run import is_loopback
    from rorqual.server.service import Service

    ledger = Ledger(options.ledger)
    open_door = not ledger.has_keys()
    if open_door and not is_loopback(options.host):
        raise ConfigError(
            f"host={options.host}: other machines could use this server without a key; make one with"
            " `rorqual keys make NAME`, or keep to 127.0.0.1"
        )
    prices = PriceList.load(options.prices) if options.prices is not None else PriceList()
    models = Models(_models(options), dict(_pair(a, "alias") for a in options.alias))
    load = _loader(options)
    return Service(models, ledger, options.settings, prices, open_door=open_door, load=load)


def _models(options: ServeOptions) -> list[Served]:
    from rorqual.server.loading import scripted

    if (options.model is None) == (options.scripted is None):
        raise ConfigError("give a MODEL folder or --scripted FILE" + (", not both" if options.model else ""))
    if options.scripted is not None:
        if options.also:
            raise ConfigError(f"also={options.also[0]!r}: not together with --scripted")
        return [scripted(options.name or "scripted", options.scripted, options.settings.max_open)]
    assert options.model is not None
    first = Path(options.model)
    load = _loader(options)
    assert load is not None
    models = [load(options.name or _name_of(first), first)]
    return models + [
        load(name, Path(path)) for name, path in (_pair(entry, "also") for entry in options.also)
    ]


def _loader(options: ServeOptions) -> Callable[[str, Path], Served] | None:
    if options.scripted is not None:
        return None
    from rorqual.server.loading import load_served

    s = options.settings
    gather = s.gather_from, s.gather_s
    return lambda name, path: load_served(name, path, s.max_open, options.engine, options.dtype, gather)


def _name_of(model: Path) -> str:
    """A folder's name, or a file's without its ending."""
    return model.stem if model.is_file() else model.resolve().name


def _pair(text: str, option: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise ConfigError(f"{option}={text!r}: write it as NAME=VALUE")
    return left, right


@dataclass(frozen=True)
class MakeKey:
    """Make a key. Its text is shown once and cannot be read back."""

    name: tyro.conf.Positional[str]
    """Whose key it is; for you to tell keys apart."""
    admin: bool = False
    """May load and drop models."""
    granted: str | None = None
    """Balance given, as a decimal number; spent before what is topped up. Makes the key metered."""
    topped_up: str | None = None
    """Balance paid, as a decimal number. Makes the key metered."""
    requests_per_minute: int | None = None
    """Requests a minute at most."""
    tokens_per_minute: int | None = None
    """Tokens a minute at most, prompt and completion."""
    concurrency: int | None = None
    """Requests open at one time at most."""
    ledger: Path = field(default_factory=default_ledger)
    """File of keys, balances and charges."""


@dataclass(frozen=True)
class ListKeys:
    """Show every key: id, name, state, balance, limits."""

    ledger: Path = field(default_factory=default_ledger)
    """File of keys, balances and charges."""


@dataclass(frozen=True)
class TopUp:
    """Add to a key's balance."""

    id: tyro.conf.Positional[str]
    """The key's id, as `rorqual keys list` shows it."""
    amount: tyro.conf.Positional[str]
    """A decimal number in the currency of the price list."""
    granted: bool = False
    """Given rather than paid."""
    ledger: Path = field(default_factory=default_ledger)
    """File of keys, balances and charges."""


@dataclass(frozen=True)
class Revoke:
    """From now on a key opens nothing."""

    id: tyro.conf.Positional[str]
    """The key's id, as `rorqual keys list` shows it."""
    ledger: Path = field(default_factory=default_ledger)
    """File of keys, balances and charges."""


KeysCommand = (
    Annotated[MakeKey, tyro.conf.subcommand("make", prefix_name=False)]
    | Annotated[ListKeys, tyro.conf.subcommand("list", prefix_name=False)]
    | Annotated[TopUp, tyro.conf.subcommand("top-up", prefix_name=False)]
    | Annotated[Revoke, tyro.conf.subcommand("revoke", prefix_name=False)]
)


def keys(argv: Sequence[str]) -> int:
    """Make, list, top up and revoke keys; a running server sees it at its next request."""
    command = tyro.cli(KeysCommand, args=list(argv), prog="rorqual keys")
    ledger = Ledger(command.ledger)
    if isinstance(command, MakeKey):
        print(_make(command, ledger))
    elif isinstance(command, TopUp):
        amount = _amount(command.amount, "amount")
        ledger.top_up(command.id, **({"granted": amount} if command.granted else {"paid": amount}))
        print(f"{command.id}: {decimal_text(_must_find(ledger, command.id).balance)} left")
    elif isinstance(command, Revoke):
        ledger.revoke(command.id)
        print(f"{command.id}: revoked")
    else:
        for key in ledger.all_keys():
            print(_line(key))
    ledger.close()
    return 0


def _make(command: MakeKey, ledger: Ledger) -> str:
    for name in ("requests_per_minute", "tokens_per_minute", "concurrency"):
        value = getattr(command, name)
        if value is not None and not 1 <= value < 2**31:
            raise ConfigError(f"{name}={value}: must be 1 to {2**31 - 1}")
    return ledger.make_key(
        command.name,
        admin=command.admin,
        metered=command.granted is not None or command.topped_up is not None,
        granted=_amount(command.granted, "granted"),
        topped_up=_amount(command.topped_up, "topped_up"),
        requests_per_minute=command.requests_per_minute,
        tokens_per_minute=command.tokens_per_minute,
        concurrency=command.concurrency,
    )


def _amount(text: str | None, option: str) -> int:
    amount = nano(text, option) if text is not None else 0
    if amount < 0:
        raise ConfigError(f"{option}={text}: must not be negative")
    return amount


def _must_find(ledger: Ledger, key_id: str) -> Key:
    key = ledger.key(key_id)
    assert key is not None
    return key


def _line(key: Key) -> str:
    state = "revoked" if key.revoked_ns is not None else "admin" if key.admin else "live"
    balance = f"{decimal_text(key.granted)} granted + {decimal_text(key.topped_up)} topped up"
    limits = {
        "requests/min": key.requests_per_minute,
        "tokens/min": key.tokens_per_minute,
        "at one time": key.concurrency,
    }
    shown = ", ".join(f"{value} {unit}" for unit, value in limits.items() if value is not None)
    return (
        f"{key.id}  {key.name}  {state}  {balance if key.metered else 'not metered'}  {shown or 'no limits'}"
    )


@dataclass(frozen=True)
class UsageOptions:
    """What was used and what it cost, by day, key and model."""

    ledger: Path = field(default_factory=default_ledger)
    """File of keys, balances and charges."""
    key: str | None = None
    """Only this key's id."""
    json: bool = False
    """One JSON object a line."""


def usage(argv: Sequence[str]) -> int:
    """Print the sums of the ledger."""
    options = tyro.cli(UsageOptions, args=list(argv), prog="rorqual usage")
    ledger = Ledger(options.ledger)
    if not options.json:
        counts = f"{'requests':>8} {'hit':>12} {'miss':>12} {'output':>12}"
        print(f"{'day':10}  {'key':12}  {'model':24} {counts}  cost")
    for row in ledger.sums(options.key):
        cost = decimal_text(row.cost)
        if options.json:
            print(json.dumps({**asdict(row), "cost": cost}))
            continue
        counts = f"{row.requests:>8} {row.hit:>12} {row.miss:>12} {row.output:>12}"
        print(f"{row.day:10}  {row.key_id or '-':12}  {row.model[:24]:24} {counts}  {cost} {row.currency}")
    ledger.close()
    return 0


@dataclass(frozen=True)
class PriceOptions:
    """Measure a model on this machine and say what a million tokens of each class cost here."""

    model: tyro.conf.Positional[Path]
    """Model folder or GGUF file."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = field(default_factory=Machine)
    currency: str = "USD"
    """Currency of the prices of power and hardware."""
    batch: int = 8
    """Requests at one time."""
    prompt_tokens: int = 256
    """Tokens of each prompt."""
    completion_tokens: int = 64
    """Tokens of each completion; 2 or more."""
    out: Path | None = None
    """Price list to write, for `rorqual serve --prices`."""


def price(argv: Sequence[str]) -> int:
    """Print the costs and, where asked, write them as a price list."""
    options = tyro.cli(PriceOptions, args=list(argv), prog="rorqual price")
    if options.batch < 1 or options.prompt_tokens < 1 or options.completion_tokens < 2:
        raise ConfigError("batch and prompt_tokens must be 1 or more, completion_tokens 2 or more")
    from rorqual.server.loading import load_engine

    engine = load_engine(options.model)
    seconds = measure(
        engine,
        batch=options.batch,
        prompt_tokens=options.prompt_tokens,
        completion_tokens=options.completion_tokens,
    )
    for name, label in (("hit", "cache hit"), ("miss", "cache miss"), ("output", "output")):
        each = getattr(seconds, name)
        cost = per_million(each, options.machine)
        print(
            f"{label:10}  {1 / max(each, 1e-12):>12.1f} tokens/s  {cost} {options.currency} a million tokens"
        )
    if options.out is not None:
        text = price_list(seconds, options.machine, "*", options.currency)
        options.out.write_text(text, encoding="utf-8")
        print(f"written: {options.out}")
    return 0
