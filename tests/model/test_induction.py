"""Looking up what followed: the sorted, the cached and the running form against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rorqual.engine.lookup import Lookup
from rorqual.model.attend import Cached, Causal, KVCache, Tree
from rorqual.model.memory import followers_reference


def by_hand(tokens: list[int], longest: int) -> list[tuple[int, int]]:
    """(follower, length of the match) of every token of one document; the follower is 0 where there is no match."""
    found = []
    for i in range(len(tokens)):
        answer = (0, 0)
        for length in range(1, min(longest, i) + 1):
            run = tokens[i - length + 1 : i + 1]
            ends = [j for j in range(length - 1, i) if tokens[j - length + 1 : j + 1] == run]
            if ends:
                answer = (tokens[ends[-1] + 1], length)
        found.append(answer)
    return found


def pairs(found: tuple[Tensor, Tensor]) -> list[list[tuple[int, int]]]:
    """With 0 for followers that do not count."""
    ids, lengths = found
    return [
        [(token * (length > 0), length) for token, length in zip(row, other, strict=True)]
        for row, other in zip(ids.tolist(), lengths.tolist(), strict=True)
    ]


def test_what_it_finds() -> None:
    tokens = [1, 2, 3, 1, 2, 4, 9, 2, 3, 1, 5, 2, 7, 7, 7]
    found = pairs(Causal().followers(torch.tensor([tokens]), 3))[0]
    assert found == by_hand(tokens, 3)
    assert found[4] == (3, 2)  # 1 2 stood before, and 3 followed
    assert found[8] == (1, 2)  # 2 3: the longer match, not the later one of 3 alone
    assert found[9] == (2, 3)  # 2 3 1
    assert found[11] == (3, 1)  # the latest of three
    assert found[13] == (7, 1)  # a token that repeats itself
    assert found[6] == (0, 0)


@pytest.mark.parametrize("longest", [1, 2, 4])
def test_rows_of_documents_equal_the_definition(longest: int) -> None:
    ids = torch.randint(0, 4, (3, 40))
    documents = torch.stack([torch.arange(40) // n for n in (40, 13, 5)])
    found = pairs(Causal(documents).followers(ids, longest))
    for row, length, got in zip(ids.tolist(), (40, 13, 5), found, strict=True):
        want = [x for s in range(0, 40, length) for x in by_hand(row[s : s + length], longest)]
        assert got == want
    context = Causal(documents)
    previous = torch.where(context._first(ids), torch.arange(40), torch.arange(40) - 1)
    reference = followers_reference(ids, context.mask(40, ids.device)[:, 0], previous, longest)
    assert pairs(reference) == found


def test_chunks_after_a_cache_equal_whole_rows() -> None:
    ids = torch.randint(0, 4, (2, 30))
    whole = pairs(Causal().followers(ids, 3))
    cache = KVCache()
    parts: list[list[tuple[int, int]]] = [[], []]
    for start, end in ((0, 7), (7, 8), (8, 30)):
        for row, more in zip(parts, pairs(Cached(cache).followers(ids[:, start:end], 3)), strict=True):
            row += more
        cache.layers[0] = (torch.zeros(2, end, 1), torch.zeros(2, end, 1))
    assert parts == whole


def test_branches_of_a_tree_equal_their_own_rows() -> None:
    start, ways = [1, 2, 3, 1, 2], ([3, 2, 3], [4, 1, 2, 4])
    tokens = start + ways[0] + ways[1]
    branch = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4])
    previous = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6, 4, 8, 9, 10]])
    found = pairs(Tree(branch, previous).followers(torch.tensor([tokens]), 3))[0]
    assert found[:8] == by_hand(start + ways[0], 3)
    assert found[:5] + found[8:] == by_hand(start + ways[1], 3)


def test_the_running_form_takes_guesses_back() -> None:
    tokens = torch.randint(0, 3, (60,)).tolist()
    want = by_hand(tokens, 3)
    lookup, computed = Lookup(3), 9
    lookup.find(tokens, 0, 9)
    while computed < 57:
        guessed = [*tokens[: computed + 2], 2 - tokens[computed + 2]]  # the last guess may be wrong
        ids, lengths = lookup.find(guessed, computed, computed + 3)
        got = [(t * (n > 0), n) for t, n in zip(ids, lengths, strict=True)]
        assert got == by_hand(guessed, 3)[computed:]
        computed += 2
    for start, end in ((30, 60), (0, 60)):  # computed again after its blocks were taken
        ids, lengths = lookup.find(tokens, start, end)
        assert [(t * (n > 0), n) for t, n in zip(ids, lengths, strict=True)] == want[start:end]


def test_layers_read_the_follower_by_the_length_of_the_match(make_model) -> None:
    model = make_model("llama", architecture="RorqualForCausalLM", induction=2)
    scale, rows = model.induction(Causal().followers(torch.tensor([[5, 6, 5, 6, 7]]), 2))
    assert scale.shape == (len(model.layers), 1, 5, 1)
    want = [0.0, 0.0, *model.induction.scale[1].tolist(), 0.0]
    torch.testing.assert_close(scale[1, 0, :, 0], torch.tensor(want))
    weight = model.induction.weight
    of_lengths = weight[-2:]  # of a match of one token, and of two
    assert len(weight) == model.config.vocab_size + 2
    assert torch.equal(rows[0, 2:4], weight[[6, 5]] + of_lengths)
