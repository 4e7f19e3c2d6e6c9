"""The build: two passes over the text with a compressed spool between them, so that memory stays flat.

Pass one (processes): read, normalise, judge, fingerprint. Here: deduplicate in order, count lines, split. Pass two
(processes): cut boilerplate, remove overlaps, tokenise. Here: write shards. meta.json comes last, in a folder that
takes its name only when all is on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rorqual.config import to_dict
from rorqual.data.boilerplate import LineCounter
from rorqual.data.bpe import train_bpe, write_tokenizer
from rorqual.data.config import BuildConfig
from rorqual.data.dedup import Deduplicator
from rorqual.data.document import Document
from rorqual.data.finish import COUNTS, EVALUATION, HELDOUT, batches, finish_batch, forget
from rorqual.data.judge import judge_unit
from rorqual.data.normalise import normalise
from rorqual.data.overlap import NgramSet
from rorqual.data.report import write_report
from rorqual.data.shards import ShardWriter, describe, id_dtype
from rorqual.data.sources import Skipped, find_files, read_unit, units
from rorqual.data.spool import Spool
from rorqual.data.tally import Tally
from rorqual.data.workers import Run, pool
from rorqual.errors import DataError
from rorqual.text.tokenizer import Tokenizer

Say = Callable[[str], None]


def build(config: BuildConfig, say: Say = lambda _: None) -> dict[str, Any]:
    """Build the folder `config.out` and return its meta. Raises DataError before work begins for sources or a
    tokenizer that cannot be used, and where nothing is left to train on."""
    if config.out.exists():
        raise DataError(f"{config.out.resolve()}: exists already; remove it or choose another folder")
    skipped = Skipped()
    given = None if config.tokenizer is None else Tokenizer.load(config.tokenizer)
    files = find_files(config.sources, skipped)
    evaluation = _evaluation_texts(config)
    config.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    work = config.out.absolute().with_name(f".{config.out.name}.{os.getpid()}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        meta = _build_in(work, config, files, given, evaluation, skipped, say)
        os.rename(work, config.out)
    except OSError as e:
        raise DataError(
            f"{config.out.resolve()}: cannot be written ({e.strerror or e}); nothing was left behind"
        ) from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return meta


def _build_in(
    work: Path,
    config: BuildConfig,
    files: Sequence[Path],
    given: Tokenizer | None,
    evaluation: Sequence[str],
    skipped: Skipped,
    say: Say,
) -> dict[str, Any]:
    tally = Tally()
    limit = None if config.limit_mb is None else int(config.limit_mb * 1e6)
    say(f"reading {len(files):,} files")
    spool = Spool(work / "spool")
    counter = LineCounter()
    with contextlib.closing(spool), pool(config.workers) as run:
        begin = time.perf_counter()
        _first_pass(config, files, limit, run, spool, counter, tally, skipped, say)
        tally.seconds["read, judge, deduplicate"] = time.perf_counter() - begin
        spool.close()
        if not tally.kept:
            raise DataError(
                f"no document was kept of {tally.documents:,} read; removed by: {_reasons(tally, skipped)}"
            )
        tokenizer_json = _tokenizer_json(config, given, spool, work, tally, say)
        begin = time.perf_counter()
        counter.counts.tofile(work / COUNTS)
        NgramSet.of(d["text"] for d in spool.read("heldout")).save(work / HELDOUT)
        NgramSet.of(evaluation).save(work / EVALUATION)
        splits = _second_pass(config, run, spool, tokenizer_json, work, tally, say)
        tally.seconds["cut, tokenise, write"] = time.perf_counter() - begin
    spool.remove()
    for name in (COUNTS, HELDOUT, EVALUATION):
        (work / name).unlink()
    tokenizer = Tokenizer.load(work)
    meta = {
        "format": 1,
        "vocab_size": tokenizer.vocab_size,
        "dtype": str(id_dtype(tokenizer.vocab_size)),
        "config": to_dict(config),
        "splits": splits,
        "tally": to_dict(tally),
        "skipped": {"counts": skipped.counts, "examples": skipped.examples},
    }
    if not sum(s["tokens"] for s in splits["train"]):
        raise DataError(f"no training text was left; the stages that removed it: {_reasons(tally, skipped)}")
    write_report(work / "report.html", meta)
    for path in work.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    (work / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return meta


def _first_pass(
    config: BuildConfig,
    files: Sequence[Path],
    limit: int | None,
    run: Run,
    spool: Spool,
    counter: LineCounter,
    tally: Tally,
    skipped: Skipped,
    say: Say,
) -> None:
    dedup = Deduplicator()
    tasks = ((unit, config.stages, config.text_key) for unit in units(files, limit))
    said = time.monotonic()
    for judged, missed in run(judge_unit, tasks):
        skipped.merge(missed)
        for one in judged:
            tally.documents += 1
            tally.raw_bytes += one.raw_bytes
            reason = one.dropped
            if reason is None and one.print is not None:
                repeated = dedup.seen(one.print)
                reason = None if repeated is None else f"dedup|{repeated}"
            if reason is not None:
                stage, _, rule = reason.partition("|")
                tally.drop(stage, rule, one.doc)
                continue
            if one.lines is not None:
                counter.add(one.lines)
            tally.kept += 1
            late = spool.documents["heldout"] == 0 and config.heldout and tally.kept >= 2 / config.heldout
            heldout = _is_heldout(one.doc, config) or late  # a small pool gets a held-out document too
            spool.write("heldout" if heldout else "train", one.doc)
        _check_malformed(config, tally, skipped)
        if time.monotonic() - said > 2:
            said = time.monotonic()
            say(f"read {tally.raw_bytes / 1e6:,.1f} MB, kept {tally.kept:,} of {tally.documents:,} documents")


def _is_heldout(doc: Document, config: BuildConfig) -> bool:
    """By a hash of the text: a document's split depends on nothing but itself and the seed."""
    digest = hashlib.blake2b(
        doc.text.encode(), digest_size=8, salt=config.seed.to_bytes(8, "little")
    ).digest()
    return int.from_bytes(digest, "little") < config.heldout * 2.0**64


def _check_malformed(config: BuildConfig, tally: Tally, skipped: Skipped) -> None:
    bad = sum(n for reason, n in skipped.counts.items() if reason.startswith(("malformed", "text is not")))
    if bad > 20 and bad > config.max_malformed * (bad + tally.documents):
        examples = [
            e
            for r, shown in skipped.examples.items()
            if r.startswith(("malformed", "text is not"))
            for e in shown
        ]
        raise DataError(
            f"{bad} of {bad + tally.documents} records are malformed (first: {', '.join(examples[:3])}); mend them, or "
            f"raise max_malformed={config.max_malformed}"
        )


def _tokenizer_json(
    config: BuildConfig, given: Tokenizer | None, spool: Spool, work: Path, tally: Tally, say: Say
) -> str:
    if given is not None:
        assert config.tokenizer is not None
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (config.tokenizer / name).is_file():
                shutil.copyfile(config.tokenizer / name, work / name)
        # Where its ids stand in files of the model beside it, they come along.
        ids = {
            "bos_token_id": given.bos_id,
            "eos_token_id": list(given.eos_ids),
            "pad_token_id": given.pad_id,
        }
        known = {k: v for k, v in ids.items() if v not in (None, [])}
        (work / "generation_config.json").write_text(json.dumps(known) + "\n", encoding="utf-8")
        return (work / "tokenizer.json").read_text(encoding="utf-8")
    say(f"training a tokenizer of {config.vocab_size:,} tokens")
    begin = time.perf_counter()
    text = train_bpe(_sample(spool, int(config.tokenizer_mb * 1e6)), config.vocab_size)
    tally.seconds["train the tokenizer"] = time.perf_counter() - begin
    write_tokenizer(work, text)
    return text


def _sample(spool: Spool, limit: int) -> Iterator[str]:
    """Documents spread over the whole pool, up to `limit` bytes."""
    step = max(1, spool.bytes["train"] // max(limit, 1))
    for i, tree in enumerate(spool.read("train")):
        if i % step == 0:
            yield tree["text"]


def _evaluation_texts(config: BuildConfig) -> list[str]:
    """The texts that training must not have seen, normalised as the pool is. Raises DataError for a file of them that
    cannot be read whole: what is not compared would leak unnoticed."""
    found: list[str] = []
    for path in find_files(config.evaluation, Skipped()) if config.evaluation else []:
        skipped = Skipped()
        docs = [d for u in units([path], None) for d in read_unit(u, skipped, config.text_key)]
        skipped.counts.pop("empty", None)
        if skipped.counts or not docs:
            reason, examples = next(iter(skipped.examples.items()), ("no text", [str(path)]))
            raise DataError(
                f"evaluation {path}: {reason} (first: {examples[0]}); mend it, or name its column with text_key, now "
                f"{config.text_key!r}"
            )
        for doc in docs:
            if config.stages.normalise:
                normalise(doc)  # its verdict does not matter: what is no good for training is compared too
            found.append(doc.text)
    return found


def _second_pass(
    config: BuildConfig,
    run: Run,
    spool: Spool,
    tokenizer_json: str,
    work: Path,
    tally: Tally,
    say: Say,
) -> dict[str, Any]:
    forget()  # a worker of this same process (workers=1) may hold an earlier build's
    vocab = Tokenizer.from_json(tokenizer_json).vocab_size
    splits: dict[str, Any] = {}
    for split in ("train", "heldout"):
        total = spool.documents[split]
        say(f"tokenising {total:,} documents ({split})")
        writer = ShardWriter(work / split, vocab)
        done, began = 0, time.monotonic()
        said = began
        found = batches(spool.read(split))
        for kept, dropped, cut in run(finish_batch, ((b, split, work, config.stages) for b in found)):
            for ids, size in kept:
                writer.add(ids, size)
                tally.kept_bytes += size
            for reason, doc in dropped:
                tally.kept -= 1
                tally.drop("boilerplate" if reason.startswith("empty") else "overlap", reason, doc)
            tally.boilerplate_lines += cut
            done += len(kept) + len(dropped)
            if time.monotonic() - said > 2:
                said = time.monotonic()
                left = (said - began) * (total - done) / done
                say(f"tokenised {done:,} of {total:,} documents, about {left:,.0f} s to go")
        splits[split] = describe(writer.close())
    forget()
    return splits


def _reasons(tally: Tally, skipped: Skipped) -> str:
    found = {**skipped.counts, **{r: n for reasons in tally.removed.values() for r, n in reasons.items()}}
    return (
        ", ".join(f"{r} ({n})" for r, n in sorted(found.items(), key=lambda item: -item[1])[:5])
        or "none were read"
    )
