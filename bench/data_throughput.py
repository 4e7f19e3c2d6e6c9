"""Megabytes a second and core of each cleaning stage, beside datatrove's on the same text.

python bench/data_throughput.py --peer-python PATH   (an environment with datatrove; without it, ours alone)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from corpus import articles, write_lines
from record import Row, faster, write_record

from rorqual.data.boilerplate import line_hashes
from rorqual.data.bpe import train_bpe
from rorqual.data.dedup import Deduplicator, fingerprint
from rorqual.data.document import Document
from rorqual.data.normalise import normalise
from rorqual.data.overlap import NgramSet
from rorqual.data.quality import quality
from rorqual.data.spam import spam
from rorqual.text.tokenizer import Tokenizer

# What of datatrove does the same work; run in its own environment, timed there by the processor's clock.
PEER = r"""
import json, sys, time, tempfile
from datatrove.data import Document
from datatrove.utils import text as T, word_tokenizers as W
from nltk.tokenize import TreebankWordTokenizer
class Words(W.WordTokenizer):  # the default wants a model from the network; this one is lighter
    def __init__(self): self.t = TreebankWordTokenizer(); self.language = "eng"
    def word_tokenize(self, text): return self.t.tokenize(text)
    def sent_tokenize(self, text): return text.split(".")
    def span_tokenize(self, text): return []
W.load_word_tokenizer = lambda *a, **k: Words()
T.load_word_tokenizer = W.load_word_tokenizer
import datatrove.pipeline.dedup.minhash as M
M.load_word_tokenizer = W.load_word_tokenizer
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
texts = [json.loads(l)["text"] for l in open(sys.argv[1], encoding="utf-8")]
docs = [Document(text=t, id=str(i)) for i, t in enumerate(texts)]
size = sum(len(t.encode()) for t in texts) / 1e6
out = {}
def clock(name, f):
    s = time.process_time(); f(); out[name] = size / (time.process_time() - s)
q, r = GopherQualityFilter(), GopherRepetitionFilter()
clock("quality", lambda: [q.filter(d) is True and r.filter(d) for d in docs])
m = M.MinhashDedupSignature(tempfile.mkdtemp(), M.MinhashConfig(num_buckets=14, hashes_per_bucket=8))
clock("dedup", lambda: [m.get_signature(m.get_shingles(d.text)) for d in docs])
print(json.dumps(out))
"""


def ours(texts: list[str]) -> dict[str, float]:
    """Megabytes a second of one core for each stage."""
    size = sum(len(t.encode()) for t in texts) / 1e6
    docs = [Document(t, "bench", "prose") for t in texts]
    tokenizer = Tokenizer.from_json(train_bpe(texts[:2000], 8192))
    dedup, held = Deduplicator(), NgramSet.of(texts[:50])
    stages: dict[str, Callable[[], object]] = {
        "normalise": lambda: [normalise(d) for d in docs],
        "quality": lambda: [quality(d) for d in docs],
        "spam": lambda: [spam(d) for d in docs],
        "dedup": lambda: [dedup.seen(fingerprint(d.text)) for d in docs],
        "boilerplate": lambda: [line_hashes(d) for d in docs],
        "overlap": lambda: [held.share(d.text) for d in docs],
        "tokenise": lambda: tokenizer.encode_batch(texts),
    }
    out = {}
    for name, work in stages.items():
        begin = time.process_time()
        work()
        out[name] = size / (time.process_time() - begin)
    return out


def main() -> int:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", help="python of an environment with datatrove")
    parser.add_argument("--megabytes", type=float, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "pool.jsonl"
        write_lines(path, articles(options.megabytes))
        texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
        theirs: dict[str, float] = {}
        if options.peer_python:
            done = subprocess.run(
                [options.peer_python, "-c", PEER, str(path)], capture_output=True, text=True, check=True
            )
            theirs = json.loads(done.stdout.strip().splitlines()[-1])
        mine = ours(texts)
    notes = {"dedup": "signature, look-up and insertion; the peer's signature alone"}
    rows: list[Row] = [
        faster(
            f"data, {stage}",
            speed,
            theirs.get(stage),
            "datatrove" if stage in theirs else "",
            1.0 if stage in theirs else None,
            "MB/s and core",
            notes.get(stage, ""),
        )
        for stage, speed in mine.items()
    ]
    write_record("data_throughput", rows, megabytes=options.megabytes)
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
