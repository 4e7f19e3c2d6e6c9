"""Prices by date and window, to the nano-unit."""

from __future__ import annotations

from datetime import datetime, timezone
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.errors import ConfigError
from rorqual.server.price import PriceList, Rates, decimal_text, nano

# DeepSeek's list of late 2026 (off-peak prices; peak is twice that, weekdays 01-04 and 06-10 UTC) and of 2025's
# night rebate, which ran past midnight.
FLASH = {
    "currency": "USD",
    "price": [
        {"model": "flash", "since": "2026-08-16T00:00:00Z", "hit": "0.007", "miss": "0.22", "output": "0.66"},
        {
            "model": "flash",
            "since": "2026-09-10T00:00:00Z",
            "hit": "0.003",
            "miss": "0.15",
            "output": "0.60",
            "window": [
                {
                    "days": ["mon", "tue", "wed", "thu", "fri"],
                    "start": "01:00",
                    "end": "04:00",
                    "factor": "2",
                    "except": ["2026-10-01"],
                },
                {"days": ["mon", "tue", "wed", "thu", "fri"], "start": "06:00", "end": "10:00", "factor": 2},
            ],
        },
        {
            "model": "*",
            "miss": "0.27",
            "output": "1.10",
            "window": [{"start": "16:30", "end": "00:30", "factor": "0.5", "days": ["fri"]}],
        },
    ],
}


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("model", "moment", "miss"),
    [
        ("flash", "2026-09-09T23:59:59", "0.22"),  # before the new list
        ("flash", "2026-09-10T00:00:00", "0.15"),  # a Thursday, off-peak
        ("flash", "2026-09-10T01:00:00", "0.30"),  # peak begins
        ("flash", "2026-09-10T03:59:59", "0.30"),
        ("flash", "2026-09-10T04:00:00", "0.15"),  # the end is outside
        ("flash", "2026-09-10T09:00:00", "0.30"),
        ("flash", "2026-09-12T02:00:00", "0.15"),  # a Saturday
        ("flash", "2026-10-01T02:00:00", "0.15"),  # a holiday, a Thursday
        ("other", "2026-01-01T12:00:00", "0.27"),
        ("other", "2026-01-02T23:00:00", "0.135"),  # a Friday night
        ("other", "2026-01-03T00:29:59", "0.135"),  # past midnight it still belongs to Friday
        ("other", "2026-01-03T00:30:00", "0.27"),
        ("other", "2026-01-02T00:15:00", "0.27"),  # early on Friday belongs to Thursday
        ("flash", "2026-01-01T12:00:00", "0.27"),  # nothing of its own yet
    ],
)
def test_rates_by_date_weekday_and_clock(model, moment, miss):
    """Worked out by hand from the list above."""
    assert PriceList.parse(FLASH).rates(model, at(moment)).miss == nano(miss, "x")


def test_without_prices_everything_is_free():
    assert PriceList().rates("m", at("2026-01-01")).cost(10**6, 10**6, 10**6) == 0


def test_a_missing_hit_price_is_the_miss_price():
    rates = PriceList.parse(FLASH).rates("other", at("2026-01-01"))
    assert rates.hit == rates.miss


def test_cost_of_a_request():
    """1,000 hits at 0.0028, 500 misses at 0.14 and 200 outputs at 0.28 a million: 0.0000028 + 0.00007 + 0.000056."""
    assert (
        decimal_text(Rates(nano("0.0028", ""), nano("0.14", ""), nano("0.28", "")).cost(1000, 500, 200))
        == "0.0001288"
    )


@given(
    st.integers(0, 10**7),
    st.integers(0, 10**7),
    st.integers(0, 10**7),
    st.lists(st.integers(0, 10**10), min_size=3, max_size=3),
)
def test_cost_is_the_exact_sum_rounded_half_up(hit, miss, output, rates):
    """Against fractions."""
    exact = Fraction(hit * rates[0] + miss * rates[1] + output * rates[2], 10**6)
    assert Rates(*rates).cost(hit, miss, output) == (2 * exact + 1) // 2


@given(st.integers(-(10**15), 10**15))
def test_decimal_strings_round_trip(amount):
    """Nothing is lost on the way to text and back; at least two decimals."""
    text = decimal_text(amount)
    assert nano(text, "x") == amount
    assert len(text.partition(".")[2]) >= 2


def test_deepseeks_balance_form():
    assert decimal_text(110 * 10**9) == "110.00"


def test_an_adapter_costs_what_its_base_does():
    """Unless it has a price of its own; before the price of all."""
    listed = [{"model": m, "miss": p, "output": p} for m, p in (("*", "1"), ("base", "2"), ("mine", "3"))]
    prices = PriceList.parse({"price": listed})
    now = at("2026-01-01")
    assert [prices.rates(m, now, "base").miss for m in ("mine", "yours")] == [nano("3", ""), nano("2", "")]
    assert prices.rates("yours", now, "other").miss == nano("1", "")


NIGHT = {"start": "01:00", "end": "02:00", "factor": "2"}


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"price": [{"miss": "1"}]}, "output"),
        ({"price": [{"miss": "x", "output": "1"}]}, "price[0].miss"),
        ({"price": [{"miss": "1", "output": "-1"}]}, "negative"),
        ({"price": [{"miss": "1", "output": "0.0000000001"}]}, "price[0].output"),
        ({"prices": []}, "prices"),
        ({"price": [{"miss": "1", "output": "1", "since": "soon"}]}, "since"),
        ({"price": [{"miss": "1", "output": "1", "window": [{"start": "1", "end": "2"}]}]}, "window[0]"),
        (
            {
                "price": [
                    {
                        "miss": "1",
                        "output": "1",
                        "window": [{"start": "01:00", "end": "02:00", "factor": "2", "days": ["funday"]}],
                    }
                ]
            },
            "days",
        ),
        ({"price": [{"miss": "1", "output": "1", "window": 5}]}, "window=5"),
        ({"price": [{"miss": "1", "output": "1", "window": [{**NIGHT, "days": 5}]}]}, "days=5"),
        ({"price": [{"miss": "1", "output": "1", "window": [{**NIGHT, "except": "2026-10-01"}]}]}, "except"),
        ({"price": [{"miss": "1", "output": "1", "window": [{**NIGHT, "start": "01:00+02:00"}]}]}, "start"),
        ({"price": [{"miss": "1e15", "output": "1"}]}, "price[0].miss"),
    ],
)
def test_a_wrong_list_is_refused_by_name(tree, named):
    with pytest.raises(ConfigError) as caught:
        PriceList.parse(tree)
    assert named in str(caught.value)
