"""Offline generation and the two commands over it."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from rorqual.checkpoint import hf
from rorqual.checkpoint.loaded import Model
from rorqual.cli import main
from rorqual.data.bpe import train_bpe, write_tokenizer
from rorqual.engine.config import EngineConfig
from rorqual.engine.llm import LLM
from rorqual.engine.request import SamplingParams
from rorqual.errors import RequestError, TokenizerError
from rorqual.model.transformer import Transformer
from rorqual.text.tokenizer import Tokenizer
from rorqual.train.config import Shape

GREEDY = SamplingParams(max_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("llm")
    write_tokenizer(work, train_bpe(["def f(x):\n    return x\n"] * 3, 300))
    vocab = Tokenizer.load(work).vocab_size
    model = Transformer(
        Shape(depth=2, width=32, heads=2, experts=4, experts_per_token=2).model(vocab, 128, 0, 1)
    )
    hf.save_model(model.init_weights(0), work / "model", tokenizer_from=work)
    return work / "model"


def test_answers_come_in_the_order_of_the_prompts(folder: Path) -> None:
    llm = LLM(folder)
    prompts = ["def f", [5, 6, 7], [{"role": "user", "content": "hi"}]]
    answers = llm.generate(prompts, GREEDY)
    assert [a.prompt_ids for a in answers] == [llm.encode(p) for p in prompts]
    assert answers[0].prompt_ids[0] == 0
    assert all(len(a.token_ids) <= 6 and a.finish_reason in ("stop", "length") for a in answers)
    streamed = "".join(d.text for d in llm.stream("def f", GREEDY))
    assert streamed == answers[0].text


def test_each_prompt_may_have_its_own_params(folder: Path) -> None:
    a, b = LLM(folder).generate(["x", "x"], [GREEDY, SamplingParams(max_tokens=2, temperature=0)])
    assert len(b.token_ids) <= 2
    assert a.token_ids[: len(b.token_ids)] == b.token_ids


def test_leaving_a_stream_early_frees_it(folder: Path) -> None:
    llm = LLM(folder)
    for _ in llm.stream("def", SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)):
        break
    assert not llm.engine.has_work()


def test_a_prompt_that_cannot_be_served_leaves_nothing_behind(folder: Path) -> None:
    llm = LLM(folder)
    with pytest.raises(RequestError, match="500 tokens"):
        llm.generate(["def", [5] * 500], GREEDY)
    assert not llm.engine.has_work()
    assert len(llm.generate(["def"], GREEDY)) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_step_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    llm = LLM(folder)
    want = llm.generate(["def"], GREEDY)[0].token_ids
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", lambda: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            llm.generate(["def", "x"], GREEDY)
    assert not llm.engine.has_work()
    assert llm.generate(["def"], GREEDY)[0].token_ids == want


def test_more_prompts_than_may_wait_are_handed_over_by_and_by(folder: Path) -> None:
    llm = LLM(folder, EngineConfig(max_waiting=2, max_num_seqs=2))
    answers = llm.generate([[5, 6, i] for i in range(9)], GREEDY)
    assert [a.prompt_ids[2] for a in answers] == list(range(9))
    assert all(a.finish_reason for a in answers)


def test_each_stream_gives_its_own_answer(folder: Path) -> None:
    llm = LLM(folder)
    params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
    want = [a.token_ids for a in llm.generate(["def", "return"], params)]
    got: list[list[int]] = [[], []]
    for pair in zip(llm.stream("def", params), llm.stream("return", params), strict=False):
        for ids, delta in zip(got, pair, strict=True):
            ids += delta.token_ids
    assert got == want
    ids = []
    for delta in llm.stream("def", params):
        ids += delta.token_ids
        assert llm.generate(["return"], params)[0].token_ids == want[1]
    assert ids == want[0]
    assert not llm.engine.has_work()


def test_a_prompt_needs_no_list_around_it(folder: Path) -> None:
    llm = LLM(folder)
    conversation = [{"role": "user", "content": "hi"}]
    for one in ("def f", [5, 6, 7], conversation, np.array([5, 6, 7]), torch.tensor([5, 6, 7])):
        want = llm.encode(one)
        assert [a.prompt_ids for a in llm.generate(one, GREEDY)] == [want]
        assert [a.prompt_ids for a in llm.generate([one], GREEDY)] == [want]
    assert llm.encode(torch.tensor([5, 6, 7])) == [5, 6, 7]
    assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize("prompt", [5.5, None, b"def", ["def"], [5, "def"], [[5]]])
def test_what_is_no_prompt_is_refused(folder: Path, prompt: object) -> None:
    with pytest.raises(RequestError, match="must be text, a list of token ids or a list of messages"):
        LLM(folder).generate([prompt], GREEDY)


def test_flops_of_a_request_by_hand(folder: Path) -> None:
    """A cached token costs nothing but the attention to it; two FLOPs a weight for every other."""
    from rorqual.model.cost import cost

    llm = LLM(folder)
    c = cost(llm.loaded.config)
    assert llm.flops(0, 1, 0) == round(2 * c.matmul + c.attention_flops(0.5, False))
    assert llm.flops(10, 10, 0) == 0
    assert llm.flops(0, 20, 5) > llm.flops(16, 20, 5) > llm.flops(16, 20, 4)


def test_text_without_a_tokenizer_is_refused(folder: Path) -> None:
    loaded = LLM(folder).loaded
    bare = LLM(Model(loaded.model, None, None))
    assert bare.generate([[1, 2]], GREEDY)[0].text == ""
    with pytest.raises(TokenizerError, match="give token ids"):
        bare.generate(["text"], GREEDY)


def test_generate_prints_prompt_and_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "def f", "--max-tokens", "4", "--temperature", "0"]) == 0
    out = capsys.readouterr().out
    assert (
        out
        == "def f"
        + LLM(folder).generate(["def f"], SamplingParams(max_tokens=4, temperature=0))[0].text
        + "\n"
    )


def test_chat_answers_each_line_of_a_pipe(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/clear\nhello\n/exit\nnever read\n"))
    assert main(["chat", str(folder), "--max-tokens", "4", "--temperature", "0"]) == 0
    first, second, *rest = capsys.readouterr().out.split("\n")
    assert first == second
    assert rest == [""]


def test_a_line_that_is_too_long_is_no_part_of_the_conversation(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(text: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert main(["chat", str(folder), "--max-tokens", "4", "--temperature", "0"]) == 0
        return capsys.readouterr().out.split("\n")

    first, long, second, *_ = said("hello\n" + "x(" * 400 + "\nhello\n")
    assert long == ""
    assert said("hello\nhello\n") == [first, second, ""]


def test_bytes_that_are_no_text_end_neither_command(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["generate", str(folder), "bad \udcff byte", "--max-tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("bad \ufffd byte")
    typed = io.TextIOWrapper(io.BytesIO(b"hi \xff\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    assert main(["chat", str(folder), "--max-tokens", "1"]) == 0


def test_a_stream_may_be_left_while_a_long_prompt_is_read(folder: Path) -> None:
    llm = LLM(folder, EngineConfig(max_num_batched_tokens=16, max_num_seqs=8))
    deltas = list(llm.stream([5, 6, 7, 8] * 20, SamplingParams(max_tokens=1)))
    assert [len(d.token_ids) for d in deltas] == [0, 0, 0, 0, 1]
    assert {d.prompt_tokens for d in deltas} == {80}
    next(iter(llm.stream([9] * 80)))
    assert not llm.engine.has_work()


def test_options_out_of_range_end_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "x", "--temperature", "-1"]) == 2
    assert "temperature=-1" in capsys.readouterr().err
