"""Rows: every token once an epoch, the same from the same seed, exact to resume, disjoint over ranks."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from rorqual.data.loader import Loader, LoaderConfig, Stage, heldout_batches
from rorqual.data.shards import ShardWriter, describe
from rorqual.errors import ConfigError, DataError


def make_set(folder: Path, documents: list[list[int]], vocab: int = 1000) -> Path:
    import json

    folder.mkdir()
    splits = {}
    for split in ("train", "heldout"):
        writer = ShardWriter(folder / split, vocab)
        for d in documents:
            writer.add(d, len(d))
        splits[split] = describe(writer.close())
    meta = {"vocab_size": vocab, "dtype": "uint16", "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """Twenty documents of 3 to 22 tokens; document i holds only the token i."""
    return make_set(tmp_path / "set", [[i] * (3 + i) for i in range(20)])


def loader(*sets: Path, **changes: object) -> Loader:
    options = {"batch_size": 2, "seq_len": 8, **changes}
    config = LoaderConfig(sets, options.pop("stages", ()), options.pop("seed", 0))
    return Loader(config, **options)


def test_an_epoch_holds_every_token_once(numbered: Path) -> None:
    source = loader(numbered, batch_size=1)
    rows = source.rows[0].per_epoch
    seen: Counter[int] = Counter()
    for _ in range(rows):
        seen.update(next(source).ids[0, :-1].tolist())
    whole = Counter({i: 3 + i for i in range(20)})
    missing = whole - seen
    assert not seen - whole
    assert sum(missing.values()) < 9  # less than a row is left over at the end


def test_documents_and_positions(numbered: Path) -> None:
    batch = next(loader(numbered, batch_size=8))
    for ids, positions, documents in zip(batch.ids, batch.positions, batch.document_ids, strict=True):
        change = ids[1:] != ids[:-1]
        assert torch.equal(change, documents[1:] != documents[:-1])
        assert positions[0] == 0
        assert (positions[1:][change] == 0).all()
        assert (positions[1:][~change] == positions[:-1][~change] + 1).all()


def test_the_same_seed_gives_the_same_batches_and_another_others(numbered: Path) -> None:
    a, b, c = loader(numbered), loader(numbered), loader(numbered, seed=1)
    first = [next(a).ids for _ in range(30)]
    assert all(torch.equal(x, next(b).ids) for x in first)
    assert not all(torch.equal(x, next(c).ids) for x in first)


@pytest.mark.parametrize("at", [1, 7, 20])
def test_a_resumed_loader_goes_on_exactly(numbered: Path, at: int) -> None:
    straight = loader(numbered)
    want = [next(straight).ids for _ in range(at + 10)][at:]
    first = loader(numbered)
    for _ in range(at):
        next(first)
    again = loader(numbered)
    again.load_state_dict(first.state_dict())
    assert all(torch.equal(next(again).ids, w) for w in want)


def test_ranks_share_out_what_one_would_take(numbered: Path) -> None:
    """pytorch/torchtitan#291: disjoint, together the whole, also after a change of their number."""
    one = loader(numbered, batch_size=4)
    two = [loader(numbered, batch_size=2, rank=r, world=2) for r in range(2)]
    for _ in range(6):
        whole = sorted(map(tuple, next(one).ids.tolist()))
        parts = sorted(tuple(row) for r in two for row in next(r).ids.tolist())
        assert parts == whole
    four = [loader(numbered, batch_size=1, rank=r, world=4) for r in range(4)]
    for r in four:
        r.load_state_dict(two[0].state_dict())
    assert sorted(tuple(row) for r in four for row in next(r).ids.tolist()) == sorted(
        map(tuple, next(one).ids.tolist())
    )


def test_a_position_of_another_shape_is_refused(numbered: Path) -> None:
    state = loader(numbered).state_dict()
    with pytest.raises(ConfigError, match="batch_size=3"):
        loader(numbered, batch_size=3).load_state_dict(state)
    with pytest.raises(ConfigError, match="seed=1"):
        loader(numbered, seed=1).load_state_dict(state)


def test_a_set_that_was_built_again_is_not_gone_on_with(numbered: Path, tmp_path: Path) -> None:
    """As many tokens and documents, but others; a position from before the sets were kept is taken."""
    state = loader(numbered).state_dict()
    other = make_set(tmp_path / "other", [[i + 1] * (3 + i) for i in range(20)])
    with pytest.raises(DataError, match=f"{other}: not the tokens of the saved position"):
        loader(other).load_state_dict(state)
    del state["sets"]
    loader(other).load_state_dict(state)


def test_weights_and_stages_mix_sets(tmp_path: Path) -> None:
    a = make_set(tmp_path / "a", [[1] * 400])
    b = make_set(tmp_path / "b", [[2] * 400])
    stages = (Stage(0.0, (1.0, 0.0)), Stage(0.5, (0.25, 0.75)))
    source = loader(a, b, batch_size=4, total_steps=200, stages=stages)
    shares = [float((next(source).ids == 2).float().mean()) for _ in range(200)]
    assert set(shares[:100]) == {0.0}
    assert np.mean(shares[100:]) == pytest.approx(0.75, abs=0.09)


def test_bad_sets_and_stages_are_refused(tmp_path: Path, numbered: Path) -> None:
    with pytest.raises(DataError, match=r"no meta\.json"):
        loader(tmp_path)
    with pytest.raises(DataError, match="not enough for one row"):
        loader(numbered, seq_len=10_000)
    other = make_set(tmp_path / "other", [[1] * 50], vocab=2000)
    with pytest.raises(DataError, match="share one tokenizer"):
        loader(numbered, other)
    with pytest.raises(DataError, match="share one tokenizer"):
        loader(numbered, vocab_size=500)
    with pytest.raises(ConfigError, match="begin at 0"):
        loader(numbered, stages=(Stage(0.5, (1.0,)),))
    with pytest.raises(ConfigError, match="2 weights for 1 sets"):
        loader(numbered, stages=(Stage(0.0, (1.0, 2.0)),))


def test_heldout_rows_are_in_order_and_limited(numbered: Path) -> None:
    batches = heldout_batches(numbered, 4, 8)
    ids = torch.cat([b.ids[:, :-1].flatten() for b in batches])
    assert (ids[1:] >= ids[:-1]).all()
    assert sum(len(b.ids) for b in heldout_batches(numbered, 4, 8, limit_rows=5)) == 5
