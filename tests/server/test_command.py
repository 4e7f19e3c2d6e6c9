"""The command line of keys and usage, and the options of serve."""

from __future__ import annotations

import json

import pytest

from rorqual.cli import main
from rorqual.errors import ConfigError
from rorqual.server.command import ServeOptions, build_service, keys, usage
from rorqual.server.ledger import Charge, Ledger
from rorqual.server.loading import scripted
from rorqual.server.models import Models
from rorqual.server.run import listen
from rorqual.server.scripted import Script, ScriptedAnswer
from rorqual.server.settings import Settings
from rorqual.server.usage import Usage


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "ledger.db")


def run(capsys, function, *argv: str) -> str:
    assert function(argv) == 0
    return capsys.readouterr().out.strip()


def test_a_keys_life(capsys, path):
    """Made, listed, topped up, revoked; the text is shown once and opens until then."""
    text = run(
        capsys, keys, "make", "ann", "--granted", "1.5", "--requests-per-minute", "60", "--ledger", path
    )
    key_id = text.split("-")[1]
    listed = run(capsys, keys, "list", "--ledger", path)
    assert key_id in listed
    assert "1.50 granted" in listed
    assert "60 requests/min" in listed
    assert text not in listed
    assert "11.50 left" in run(capsys, keys, "top-up", key_id, "10", "--ledger", path)
    run(capsys, keys, "revoke", key_id, "--ledger", path)
    assert "revoked" in run(capsys, keys, "list", "--ledger", path)
    ledger = Ledger(path)
    assert ledger.find_key(text) is None
    ledger.close()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("make", "x", "--granted", "much"), "granted"),
        (("make", "x", "--granted", "-1"), "granted"),
        (("make", "x", "--concurrency", "0"), "concurrency"),
        (("make", "x", "--granted", "1e11"), "granted"),
        (("make", "x", "--requests-per-minute", "9" * 20), "requests_per_minute"),
        (("top-up", "nobody", "1"), "no such id"),
        (("revoke", "nobody"), "no such id"),
    ],
)
def test_wrong_use_is_one_line(capsys, path, argv, named):
    """Exit code 2 and a message that names the field."""
    assert main(["keys", *argv, "--ledger", path]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert named in said


def test_usage(capsys, path):
    """A table, or JSON lines with the cost as a decimal string."""
    ledger = Ledger(path)
    ledger.charge(Charge("r", "k", "m", "/x", Usage(prompt=10, cached=4, completion=3, cost=1500), "stop"))
    ledger.close()
    row = json.loads(run(capsys, usage, "--json", "--ledger", path))
    assert (row["hit"], row["miss"], row["output"], row["cost"]) == (4, 6, 3, "0.0000015")
    table = run(capsys, usage, "--ledger", path)
    assert "0.0000015 USD" in table


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "MODEL"),
        ({"model": "a", "scripted": "b"}, "not both"),
        ({"scripted": "s.json", "also": ("a=b",)}, "also"),
        ({"scripted": "s.json", "alias": ("a",)}, "alias"),
        ({"scripted": "s.json", "alias": ("a=nobody",)}, "nobody"),
        ({"scripted": "empty.json"}, "answers"),
    ],
)
def test_serve_options_that_contradict(tmp_path, fields, named):
    (tmp_path / "s.json").write_text("{}")
    (tmp_path / "empty.json").write_text('{"answers": []}')
    fields = {k: tmp_path / v if k == "scripted" else v for k, v in fields.items()}
    with pytest.raises(ConfigError, match=named):
        build_service(ServeOptions(ledger=tmp_path / "l.db", **fields))


@pytest.mark.parametrize("port", [-1, 70000])
def test_a_port_out_of_range(port):
    with pytest.raises(ConfigError, match=f"port={port}"):
        listen("127.0.0.1", port)


@pytest.mark.parametrize(
    "field",
    [
        {"max_body_bytes": -1},
        {"max_open": 0},
        {"keep_alive_s": 0},
        {"request_timeout_s": 0},
        {"write_timeout_s": float("nan")},
        {"drain_s": -1},
        {"gather_from": -1},
    ],
)
def test_settings_that_make_no_sense(field):
    with pytest.raises(ConfigError, match=next(iter(field))):
        Settings(**field)


def test_two_models_of_one_name():
    """One of them could not be reached."""
    made = [scripted("a", Script(answers=(ScriptedAnswer(text=t),)), 8) for t in "xy"]
    with pytest.raises(ConfigError, match="'a'"):
        Models(made)
