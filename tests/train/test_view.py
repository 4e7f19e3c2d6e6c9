"""What a person reads: plain lines, the live panel, curves."""

import io
import os
import re
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import CapacityError, ConfigError
from rorqual.model.cost import cost
from rorqual.train import memory
from rorqual.train.bill import bill_lines
from rorqual.train.config import TrainConfig
from rorqual.train.memory import check_memory, training_bytes
from rorqual.train.metrics import Log, read
from rorqual.train.plot import Curve, chart, round_values
from rorqual.train.shape import Shape
from rorqual.train.view import Lines, Live, TensorBoard, duration, sparkline, summary, view

LINE: dict[str, Any] = {
    "step": 20, "loss": 2.5, "heldout_bpb": 1.234, "tokens_per_second": 5400.0, "mfu": 0.41, "load_spread": 0.5,
    "load_spreads": [0.5, 0.25], "balance_alpha": 1e-4, "balance_loss": 2.031, "skipped": 1, "eta_seconds": 200.0,
    "seconds": 61.0, "optimizer_share": 0.08, "sample": "def f():\n    [bold]x[/bold]",
}  # fmt: skip


def test_a_line_says_everything_in_a_persons_units() -> None:
    assert summary(LINE) == (
        "step 20, loss 2.500, held-out 1.234 bits/byte, 5,400 tokens/s, MFU 41%, expert load spread 0.50, "
        "balance 0.0001 x 2.031, 1 steps skipped, 3m 20s left"
    )


def test_lines_are_printed_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    shown = view("run", 100)
    assert isinstance(shown, Lines)
    shown.update({**LINE, "step": 1})
    shown.update(
        {k: v for k, v in LINE.items() if k != "heldout_bpb"} | {"step": 2}
    )  # too soon after the first
    shown.update({**LINE, "step": 3})  # an evaluation is always shown
    shown.close()
    assert [text.split(",")[0] for text in capsys.readouterr().out.splitlines()] == ["step 1", "step 3"]


def test_a_reader_who_leaves_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rorqual train | head -3`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as unread:
        monkeypatch.setattr("sys.stdout", unread)
        shown = Lines()
        shown.say("nobody reads this")
        shown.update(LINE)


def test_the_live_panel_shows_figures_and_a_sample_as_it_is() -> None:
    from rich.console import Console

    live = Live("demo", 100)
    live.close()
    live.update(LINE)
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=False).print(live._render())
    text = out.getvalue()
    for words in (
        "demo",
        "1.234",
        "5,400",
        "3m 20s",
        "by layer 0.50  0.25",
        "1 steps skipped",
        "[bold]x[/bold]",
    ):
        assert words in text, words


def test_sparklines() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, float("nan"), 1.0], 8) == "▁▁"
    assert len(sparkline([float(i) for i in range(1000)], 30)) == 30
    assert sparkline([], 30) == ""


def test_durations() -> None:
    assert [duration(s) for s in (5, 65, 3700)] == ["5s", "1m 05s", "1h 01m"]


def test_tensorboard_is_asked_for_by_name(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install tensorboard"):
            TensorBoard(tmp_path, Lines())


def test_a_half_written_last_line_is_left_out_and_later_steps_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert [x["step"] for x in read(tmp_path)] == [1, 2, 3]
    with Log(tmp_path, 2) as log:
        log.write({"step": 3, "again": True})
        log.rewind(1)
        log.write({"step": 2, "again": True})
    assert read(tmp_path) == [{"step": 1}, {"step": 2, "again": True}]


def test_charts_have_round_axes_and_survive_what_is_not_finite() -> None:
    assert round_values(0.13, 0.92, 5) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert chart("nothing", [Curve("a", [(1, float("nan"))])]) == ""
    page = chart(
        "loss <b>",
        [Curve("a", [(i, 5 / i) for i in range(1, 3000)]), Curve("b", [(1, float("inf")), (9, 1.0)], True)],
    )
    assert "loss &lt;b&gt;" in page
    assert len(re.findall(r"[\d.]+,[\d.]+", page.split("points='")[1].split("'")[0])) <= 400
    assert "nan" not in page
    assert "inf" not in page


def test_the_price_of_options_is_shown() -> None:
    config = TrainConfig(shape=Shape(ngram_table_size=1000, value_embeddings=True, mtp=1))
    lines = "\n".join(bill_lines(config, cost(config.shape.model(4096, 256))))
    assert "ngram_table_size=1000: +0.26M parameters, +0.0% FLOPs" in lines
    assert re.search(r"num_nextn_predict_layers=1: \+\d\.\d\dM parameters, \+\d\d\.\d% FLOPs", lines)


def test_a_batch_that_cannot_fit_is_refused_with_one_that_would(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(batch_size=64, seq_len=512, shape=Shape(depth=6))
    model = config.shape.model(4096, 512)
    monkeypatch.setattr(memory, "available_memory", lambda: int(training_bytes(config, model, 17)))
    with pytest.raises(
        CapacityError, match=r"batch_size=64 rows of seq_len=512.*batch_size=16 with accumulate=4"
    ):
        check_memory(config, model)
    monkeypatch.setattr(memory, "available_memory", lambda: 10)
    with pytest.raises(CapacityError, match="recompute=true"):
        check_memory(config, model)
