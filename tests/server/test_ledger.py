"""Keys, balances and charges; nothing lost when the process is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from rorqual.errors import ConfigError
from rorqual.server.ledger import Charge, Ledger
from rorqual.server.usage import Usage


def charge(request_id: str, key_id: str | None, cost: int, **counts: int) -> Charge:
    return Charge(request_id, key_id, "m", "/chat/completions", Usage(cost=cost, **counts), "stop")


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path / "sub" / "ledger.db")
    yield made
    made.close()


def test_a_key_is_found_by_its_text_only(ledger, tmp_path):
    """The text opens; its id, a changed letter and another's secret do not; the file does not hold the text."""
    text, other = ledger.make_key("ann"), ledger.make_key("bob")
    assert ledger.find_key(text).name == "ann"
    key_id = text.split("-")[1]
    for wrong in (
        "",
        "rq",
        "rq-",
        "rq--",
        key_id,
        text[:-1],
        text + "x",
        text.upper(),
        f"rq-{key_id}-{other.split('-', 2)[2]}",
        "é" * 50,
    ):
        assert ledger.find_key(wrong) is None
    secret = text.split("-", 2)[2].encode()
    files = list((tmp_path / "sub").iterdir())
    assert files
    assert all(secret not in file.read_bytes() for file in files)


def test_a_revoked_key_opens_nothing_but_the_door_stays_shut(ledger):
    text = ledger.make_key("ann")
    ledger.revoke(text.split("-")[1])
    assert ledger.find_key(text) is None
    assert ledger.has_keys()


def test_unknown_ids_are_refused(ledger):
    for change in (ledger.revoke, lambda i: ledger.top_up(i, paid=1)):
        with pytest.raises(ConfigError, match="no such id"):
            change("nope")


def test_row_62_granted_is_spent_before_topped_up(ledger):
    """5 granted and 10 topped up, less 3, 4 and 10: 2+10, 0+8, 0-2."""
    text = ledger.make_key("ann", metered=True, granted=5, topped_up=10)
    left = []
    for i, cost in enumerate((3, 4, 10)):
        ledger.charge(charge(f"r{i}", text.split("-")[1], cost))
        key = ledger.find_key(text)
        left.append((key.granted, key.topped_up))
    assert left == [(2, 10), (0, 8), (0, -2)]


def test_an_unmetered_key_is_recorded_but_keeps_no_balance(ledger):
    text = ledger.make_key("ann")
    ledger.charge(charge("r", text.split("-")[1], 7))
    assert ledger.find_key(text).balance == 0
    assert next(ledger.sums()).cost == 7


def test_sums_by_day_key_and_model(ledger):
    ledger.charge(charge("a", "k", 1, prompt=10, cached=4, completion=3))
    ledger.charge(charge("b", "k", 2, prompt=10, cached=0, completion=3))
    ledger.charge(charge("c", None, 4, prompt=1, completion=1))
    rows = {row.key_id: row for row in ledger.sums()}
    assert (rows["k"].requests, rows["k"].hit, rows["k"].miss, rows["k"].output, rows["k"].cost) == (
        2,
        4,
        16,
        6,
        3,
    )
    assert rows[None].cost == 4
    assert [row.cost for row in ledger.sums("k")] == [3]


def test_a_charge_counts_once(ledger):
    """The same request id again is refused whole: no second row, no second deduction."""
    text = ledger.make_key("ann", metered=True, topped_up=10)
    key_id = text.split("-")[1]
    ledger.charge(charge("r", key_id, 3))
    with pytest.raises(Exception, match="UNIQUE"):
        ledger.charge(charge("r", key_id, 3))
    assert ledger.find_key(text).balance == 7


def test_a_file_that_is_no_ledger(tmp_path):
    (tmp_path / "x.db").write_text("not a database, and long enough to be read as a header of one" * 9)
    with pytest.raises(ConfigError, match=r"x\.db"):
        Ledger(tmp_path / "x.db")


def test_a_folder_that_cannot_be_made(tmp_path):
    """A file stands where it should be."""
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError, match=r"ledger .*l\.db"):
        Ledger(tmp_path / "x" / "l.db")


SERVER = """
import json, sys
from rorqual.server.ledger import Charge, Ledger
from rorqual.server.usage import Usage
ledger = Ledger(sys.argv[1])
i = 0
while True:
    usage = Usage(prompt=i % 50, cached=i % 7 if i % 50 > 7 else 0, completion=i % 11, cost=i % 13)
    ledger.charge(Charge(f"r{i}", sys.argv[2], "m", "/x", usage, "stop"))
    print(json.dumps([usage.prompt, usage.completion, usage.cost]), flush=True)
    i += 1
"""


def test_row_62_nothing_told_is_lost_on_kill_9(tmp_path):
    """A process charges and then tells; it is killed; all that it told is in the file, and the balance agrees."""
    path = tmp_path / "ledger.db"
    ledger = Ledger(path)
    text = ledger.make_key("ann", metered=True, topped_up=10**9)
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(path), text.split("-")[1]], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(300)]
    process.send_signal(signal.SIGKILL)
    told += process.stdout.readlines()
    process.wait()
    process.stdout.close()
    if not told[-1].endswith(b"\n"):
        told.pop()
    told = [json.loads(line) for line in told]
    row = next(ledger.sums())
    assert len(told) <= row.requests <= len(told) + 1
    assert row.hit + row.miss >= sum(t[0] for t in told)
    assert row.cost >= sum(t[2] for t in told)
    assert ledger.find_key(text).balance == 10**9 - row.cost
    ledger.close()
