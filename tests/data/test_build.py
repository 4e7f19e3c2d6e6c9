"""A whole build: what was planted is found, clean text stays, shards read back, and nothing half-built has a name."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rorqual.cli import main
from rorqual.data.build import build
from rorqual.data.config import BuildConfig, Stages
from rorqual.data.shards import TokenSet, id_dtype, read_meta
from rorqual.errors import DataError
from rorqual.text.tokenizer import Tokenizer


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def quick(sources: list[Path], out: Path, **changes: object) -> BuildConfig:
    base = {"vocab_size": 400, "workers": 1, "heldout": 0.0}
    return BuildConfig(tuple(map(str, sources)), out, **{**base, **changes})


def documents(folder: Path, split: str = "train") -> list[str]:
    t = Tokenizer.load(folder)
    s = TokenSet(folder, split, verify=True)
    return [t.decode(s.document(i).tolist(), skip_special=True) for i in range(len(s))]


def test_planted_faults_are_found_and_clean_text_stays(
    tmp_path: Path, make_article: Callable[..., str]
) -> None:
    """At least 99% of what was planted, under 0.1% of what was clean."""
    rng = random.Random(0)
    clean = [make_article(i) for i in range(400)]
    near = []
    for t in clean[:60]:
        w = t.split(" ")
        w[rng.randrange(len(w))] = "somewhere"
        near.append(" ".join(w))
    junk = [
        "click here " * 30,
        "a b c d e f",
        "1 2 3 4 " * 80,
        "BUY NOW!!! cheap viagra www.x.com\n" * 40,
    ] * 10
    leaked = [make_article(5000 + i) for i in range(30)]
    lines(tmp_path / "eval.jsonl", leaked)
    planted = [*clean[:50], *near, *junk, *leaked]
    pool = lines(tmp_path / "pool.jsonl", clean + planted)
    build(quick([pool], tmp_path / "out", evaluation=(str(tmp_path / "eval.jsonl"),)))
    kept = documents(tmp_path / "out")
    assert len([t for t in clean if t in kept]) >= 400 - 0.001 * 400
    assert len(kept) - 400 <= 0.01 * len(planted)


def test_shards_read_back_with_boundaries_and_markers(
    tmp_path: Path, make_article: Callable[..., str]
) -> None:
    texts = [make_article(i) for i in range(8)]
    meta = build(quick([lines(tmp_path / "a.jsonl", texts)], tmp_path / "out"))
    assert sorted(documents(tmp_path / "out")) == sorted(texts)
    s = TokenSet(tmp_path / "out", "train")
    t = Tokenizer.load(tmp_path / "out")
    assert {int(s.document(i)[0]) for i in range(8)} == {t.bos_id}
    assert {int(s.document(i)[-1]) for i in range(8)} == set(t.eos_ids)
    assert meta["vocab_size"] == t.vocab_size <= 400
    assert s.bytes == sum(len(x.encode()) for x in texts)


def test_the_result_does_not_depend_on_workers(tmp_path: Path, make_article: Callable[..., str]) -> None:
    texts = [make_article(i % 20) for i in range(30)]
    pool = lines(tmp_path / "a.jsonl", texts)
    for workers in (1, 2):
        build(quick([pool], tmp_path / f"w{workers}", workers=workers, heldout=0.2))
    a, b = (read_meta(tmp_path / f"w{w}")["splits"] for w in (1, 2))
    assert a == b
    assert a["heldout"][0]["documents"] > 0


def test_heldout_documents_and_their_copies_are_not_in_the_pool(tmp_path: Path, make_article) -> None:
    texts = [make_article(i) for i in range(60)]
    mixed = [*texts, *(f"{make_article(900 + i, 6)}{t}" for i, t in enumerate(texts))]
    build(quick([lines(tmp_path / "a.jsonl", mixed)], tmp_path / "out", heldout=0.2))
    held, pool = documents(tmp_path / "out", "heldout"), documents(tmp_path / "out")
    assert held
    for h in held:
        middle = h[len(h) // 3 : len(h) // 3 + 400]
        assert not any(middle in p for p in pool)


@pytest.mark.parametrize("stage", ["quality", "spam", "dedup", "overlap"])
def test_a_stage_that_is_off_removes_nothing(tmp_path: Path, make_article, stage: str) -> None:
    base = make_article(1)
    texts = {
        "quality": ["short but kept", base],
        "spam": ["buy now cheap price www.x.com\n" * 3 + make_article(2, 6) for _ in range(1)],
        "dedup": [base, base],
        "overlap": [base, make_article(2)],
    }[stage]
    lines(tmp_path / "eval.jsonl", [base] if stage == "overlap" else [make_article(77)])
    pool = lines(tmp_path / "a.jsonl", texts)
    common = {"evaluation": (str(tmp_path / "eval.jsonl"),)}
    build(quick([pool], tmp_path / "off", stages=Stages(**{stage: False}), **common))
    assert len(documents(tmp_path / "off")) == len(texts)


def test_many_kinds_of_files(tmp_path: Path, make_article, make_code) -> None:
    """Lightning-AI/litgpt#1413: folders among files, empty, binary, packed; each counted with its reason."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text(make_article(1))
    (folder / "sub" / "b.py").write_text(make_code(1))
    (folder / "c.md.gz").write_bytes(gzip.compress(make_article(2).encode()))
    (folder / "d.jsonl.zst").write_bytes(
        zstandard.compress((json.dumps({"text": make_article(3)}) + "\n").encode())
    )
    pq.write_table(pa.table({"text": [make_article(4), None]}), folder / "e.parquet")
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\0\1\2" * 100)
    (folder / "latin1.txt").write_bytes(("é" * 400 + make_article(5)).encode("latin-1"))
    (folder / "picture.png").write_bytes(b"x")
    meta = build(quick([folder], tmp_path / "out"))
    want = {make_article(i) for i in (1, 2, 3, 4)} | {make_code(1)}
    assert set(documents(tmp_path / "out")) == want
    counts = meta["skipped"]["counts"]
    assert counts["binary"] == 1
    assert counts["empty"] == 2
    assert counts["not a text type (.png)"] == 1
    assert meta["tally"]["removed"]["normalise"]["broken encoding"] == 1
    assert "binary.txt" in (tmp_path / "out" / "report.html").read_text()


def test_large_files_are_cut_between_lines(
    tmp_path: Path, make_article, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rorqual.data.sources.UNIT_BYTES", 5000)
    texts = [make_article(i) for i in range(20)]
    build(quick([lines(tmp_path / "a.jsonl", texts)], tmp_path / "out"))
    assert sorted(documents(tmp_path / "out")) == sorted(texts)


def test_malformed_lines_are_counted_and_limited(tmp_path: Path, make_article) -> None:
    good = [json.dumps({"text": make_article(i)}) for i in range(10)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*good, "{broken", '{"other": 1}', "[]"]) + "\n")
    meta = build(quick([path], tmp_path / "out"))
    assert meta["skipped"]["counts"] == {"malformed line (no JSON object with 'text')": 3}
    path.write_text("\n".join([*good, *["{broken"] * 30]) + "\n")
    with pytest.raises(DataError, match=r"30 of 40 records are malformed.*max_malformed"):
        build(quick([path], tmp_path / "bad"))
    assert not (tmp_path / "bad").exists()


def test_a_build_that_fails_leaves_nothing(
    tmp_path: Path, make_article, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = lines(tmp_path / "a.jsonl", [make_article(0)])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rorqual.data.build.write_report", full)
    with pytest.raises(DataError, match="No space left"):
        build(quick([pool], tmp_path / "out"))
    assert {p.name for p in tmp_path.iterdir()} == {"a.jsonl"}


def test_vocabularies_choose_the_width_of_ids() -> None:
    """huggingface/transformers#2825: 70000 must not become 4464."""
    assert id_dtype(65_536) == np.uint16
    assert id_dtype(129_280) == np.uint32
    ids = np.array([0, 65_535, 65_536, 129_279])
    assert (ids.astype(id_dtype(129_280)) == ids).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "no such file, folder or pattern"),
        (["{tmp}/a.png"], "no readable file"),
        (["{tmp}/short.txt"], "no document was kept"),
        (["{tmp}/ok.txt", "--vocab-size", "10"], "vocab_size=10"),
        (["{tmp}/ok.txt", "--tokenizer", "{tmp}"], "no tokenizer.json"),
        (["{tmp}/ok.txt", "--heldout", "2"], "heldout=2"),
        (["{tmp}/ok.txt", "--out", "{tmp}"], "exists already"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    tmp_path: Path, make_article, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "short.txt").write_text("hello")
    (tmp_path / "ok.txt").write_text(make_article(0))
    filled = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    if "--out" not in filled:
        filled += ["--out", str(tmp_path / "out")]
    assert main(["data", "build", *filled, "--workers", "1"]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_damaged_shard_is_noticed(tmp_path: Path, make_article) -> None:
    build(quick([lines(tmp_path / "a.jsonl", [make_article(0)])], tmp_path / "out"))
    path = tmp_path / "out" / "train" / "00000.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="checksum"):
        TokenSet(tmp_path / "out", "train", verify=True)
    path.write_bytes(data[:-2])
    with pytest.raises(DataError, match=r"not .* tokens long"):
        TokenSet(tmp_path / "out", "train")


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_tokenizer(tmp_path: Path, make_code) -> None:
    import transformers

    (tmp_path / "a.py").write_text(make_code(0))
    build(quick([tmp_path / "a.py"], tmp_path / "out"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = Tokenizer.load(tmp_path / "out")
    for text in ("def f(x):\n    return x", "  你好 👋 123"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text, add_bos=False)
    chat = [{"role": "user", "content": "hi"}]
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>"


def test_workers_end_with_a_build_that_is_killed(tmp_path: Path, make_article) -> None:
    import signal
    import subprocess
    import sys
    import time

    import psutil

    pool = lines(tmp_path / "a.jsonl", [make_article(i, 400) for i in range(300)])
    command = [
        sys.executable,
        "-m",
        "rorqual.cli",
        "data",
        "build",
        str(pool),
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL)
    family: list[psutil.Process] = []
    for _ in range(600):
        family = psutil.Process(process.pid).children(recursive=True)
        if sum("spawn_main" in " ".join(p.cmdline()) for p in family if p.is_running()) >= 2:
            break
        time.sleep(0.05)
    time.sleep(1.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    assert not (tmp_path / "out").exists()


def test_a_given_tokenizers_ids_come_along_from_the_model_beside_it(tmp_path: Path, make_article) -> None:
    """Its tokenizer_config.json may name none; documents begin and end with them all the same."""
    pool = lines(tmp_path / "a.jsonl", [make_article(i) for i in range(8)])
    build(quick([pool], tmp_path / "first"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_bytes((tmp_path / "first" / "tokenizer.json").read_bytes())
    (model / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 5]}))
    build(quick([pool], tmp_path / "out", tokenizer=model))
    found, s = Tokenizer.load(tmp_path / "out"), TokenSet(tmp_path / "out", "train")
    assert (found.bos_id, found.eos_ids) == (0, (1, 5))
    assert {(int(s.document(i)[0]), int(s.document(i)[-1])) for i in range(len(s))} == {(0, 1)}


@pytest.mark.parametrize("content", ['{"question": "what?"}\n', "{broken\n", ""])
def test_an_evaluation_file_that_cannot_be_compared_stops_the_build(
    tmp_path: Path, make_article, content: str
) -> None:
    pool = lines(tmp_path / "a.jsonl", [make_article(i) for i in range(4)])
    (tmp_path / "eval.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"eval\.jsonl.*text_key"):
        build(quick([pool], tmp_path / "out", evaluation=(str(tmp_path / "eval.jsonl"),)))


def test_an_evaluation_text_is_found_in_another_form_of_unicode(tmp_path: Path, make_article) -> None:
    import unicodedata

    leaked = make_article(99).replace("a", "\u00e4")
    pool = lines(tmp_path / "a.jsonl", [leaked, *(make_article(i) for i in range(4))])
    lines(tmp_path / "eval.jsonl", [unicodedata.normalize("NFD", leaked)])
    build(quick([pool], tmp_path / "out", evaluation=(str(tmp_path / "eval.jsonl"),)))
    assert len(documents(tmp_path / "out")) == 4


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path, make_article) -> None:
    text = make_article(0)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x\ud83dx " + text}))
    build(quick([tmp_path / "a.jsonl"], tmp_path / "out"))
    assert documents(tmp_path / "out") == ["x\ufffdx " + text]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_packed_file_that_was_cut_off_or_is_something_else_is_named(
    tmp_path: Path, make_article, kind: str
) -> None:
    import zstandard

    text = "".join(json.dumps({"text": make_article(i)}) + "\n" for i in range(300)).encode()
    packed = gzip.compress(text) if kind == "gz" else zstandard.compress(text)
    good = lines(tmp_path / "good.jsonl", [make_article(1000)])
    cut, other = tmp_path / f"cut.jsonl.{kind}", tmp_path / f"other.jsonl.{kind}"
    cut.write_bytes(packed[: len(packed) // 2])
    other.write_bytes(text[:200])
    meta = build(quick([good, cut, other], tmp_path / "out"))
    named = [e for r, found in meta["skipped"]["examples"].items() if "unreadable" in r for e in found]
    assert sorted(named) == [str(cut), str(other)]


def test_a_small_file_of_lines_is_cut_at_the_limit(tmp_path: Path, make_article) -> None:
    pool = lines(tmp_path / "a.jsonl", [make_article(i) for i in range(60)])
    meta = build(quick([pool], tmp_path / "out", limit_mb=pool.stat().st_size / 3e6))
    assert 15 <= meta["tally"]["documents"] <= 25


@pytest.mark.parametrize("fault", ["short", "order", "missing"])
def test_damaged_bounds_of_documents_are_refused(tmp_path: Path, make_article, fault: str) -> None:
    build(quick([lines(tmp_path / "a.jsonl", [make_article(i) for i in range(9)])], tmp_path / "out"))
    path = tmp_path / "out" / "train" / "00000.idx"
    starts = np.fromfile(path, dtype=np.uint64)
    if fault == "order":
        starts[2], starts[3] = starts[3], starts[2]
    (starts[:3] if fault == "short" else starts).tofile(path)
    if fault == "missing":
        path.unlink()
    with pytest.raises(DataError, match=r"00000\.idx: (damaged|missing)"):
        TokenSet(tmp_path / "out", "train")
