"""Costs by arithmetic, and a measurement that ends in a price list the server reads."""

from __future__ import annotations

import pytest

from rorqual.errors import ConfigError
from rorqual.server.costing import Machine, Seconds, measure, per_million, price_list
from rorqual.server.price import PriceList, Rates
from rorqual.server.scripted import Script, ScriptedAnswer, ScriptedEngine


def test_the_price_of_a_second():
    """1 kW at 0.36 a kWh is 0.0001 a second; 31,557.6 of hardware over 2 years busy half the time is 0.001."""
    machine = Machine(watts=1000, price_of_kwh=0.36, price_of_hardware=31557.6, years=2, busy=0.5)
    assert machine.price_of_second == pytest.approx(0.0011)
    assert float(per_million(0.01, machine)) == pytest.approx(11, abs=2e-6)


def test_the_list_is_one_that_the_server_reads(tmp_path):
    machine = Machine(watts=1000, price_of_kwh=3.6, price_of_hardware=0)
    text = price_list(Seconds(hit=1e-6, miss=1e-4, output=1e-3), machine, "*", "EUR")
    (tmp_path / "prices.toml").write_text(text)
    listed = PriceList.load(tmp_path / "prices.toml")
    assert listed.currency == "EUR"
    rates = listed.prices[0].rates
    assert rates.hit <= rates.miss <= rates.output
    assert rates.output == pytest.approx(Rates(output=10**9).output, rel=1e-3)


def test_measure_times_each_class():
    """On the scripted engine, whose 2 ms a step are shared by two requests."""
    engine = ScriptedEngine(Script(answers=(ScriptedAnswer(text="ab", endless=True, delay_s=0.002),)))
    seconds = measure(engine, batch=2, prompt_tokens=32, completion_tokens=10)
    assert seconds.output > 0.0005
    assert seconds.miss > 0
    assert seconds.hit > 0
    assert not engine.has_work()


@pytest.mark.parametrize(
    "fields", [{"watts": -1}, {"years": 0}, {"busy": 0}, {"busy": 1.5}, {"price_of_kwh": -0.1}]
)
def test_machines_that_cannot_be(fields):
    with pytest.raises(ConfigError):
        Machine(**fields)


def test_a_context_too_short_to_measure():
    with pytest.raises(ConfigError, match="context"):
        measure(ScriptedEngine(Script(max_model_len=64)), batch=1, prompt_tokens=60, completion_tokens=10)
