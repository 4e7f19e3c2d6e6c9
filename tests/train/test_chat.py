"""Conversations to tokens: the assistant's words, all of them and nothing else, cut where inference cuts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.errors import ConfigError, DataError
from rorqual.text.template import ChatTemplate
from rorqual.text.tokenizer import Tokenizer
from rorqual.train.chat import Example, examples, read_chats
from rorqual.train.packs import Packs

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "def"},
    {"role": "assistant", "content": "return total"},
    {"role": "user", "content": "class"},
    {"role": "assistant", "content": "Box5"},
]


@pytest.fixture
def tokenizer(token_set: Path) -> Tokenizer:
    return Tokenizer.load(token_set)


@pytest.fixture
def template(token_set: Path) -> ChatTemplate:
    found = ChatTemplate.load(token_set)
    assert found is not None
    return found


def said(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([i for i, m in zip(example.ids, example.mask, strict=True) if m])


def test_the_mask_covers_the_answers_and_their_end_tokens(
    tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    (example,) = examples(CHAT, None, tokenizer, template)
    end = tokenizer.decode([tokenizer.eos_ids[0]])
    assert said(example, tokenizer) == f"return total{end}Box5{end}"
    assert tokenizer.decode(example.ids) == template.render(CHAT, add_generation_prompt=False)


def test_the_prompt_is_tokenised_as_at_inference(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """No token may reach from the prompt into the answer."""
    (example,) = examples(CHAT, None, tokenizer, template)
    prompt = tokenizer.encode(template.render(CHAT[:4], add_generation_prompt=True), add_bos=False)
    answer_begins = max(i for i, m in enumerate(example.mask) if m and not example.mask[i - 1])
    assert example.ids[:answer_begins] == prompt


def test_what_follows_the_end_token_is_not_learnt(tokenizer: Tokenizer) -> None:
    """ChatML writes a line feed behind it, which no model ever generates."""
    end = tokenizer.decode([tokenizer.eos_ids[0]])
    form = "{% for m in messages %}{{ m.role + ':' + m.content + '" + end + "\n' }}{% endfor %}"
    form += "{% if add_generation_prompt %}assistant:{% endif %}"
    (example,) = examples(CHAT[1:3], None, tokenizer, ChatTemplate(form))
    assert said(example, tokenizer) == f"return total{end}"
    assert tokenizer.decode(example.ids).endswith(f"{end}\n")


def test_a_template_that_drops_earlier_reasoning_gives_an_example_for_each_answer(
    tokenizer: Tokenizer,
) -> None:
    form = (
        "{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}A{% else %}"
        "{% if loop.last %}({{ m.reasoning_content }}){% endif %}{{ m.content }};{% endif %}{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one", "reasoning_content": "why"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "two", "reasoning_content": "how"},
    ]
    found = list(examples(messages, None, tokenizer, ChatTemplate(form)))
    assert [said(e, tokenizer) for e in found] == ["(why)one;", "(how)two;"]
    assert tokenizer.decode(found[1].ids) == "U1Aone;U2A(how)two;"


def write(path: Path, *lines: Any) -> Path:
    path.write_text(
        "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", encoding="utf-8"
    )
    return path


def test_bad_lines_are_counted_and_shown_up_to_a_limit(tmp_path: Path) -> None:
    good = {"messages": CHAT}
    path = write(tmp_path / "a.jsonl", *[good] * 30, "{", {"messages": CHAT[:2]})
    found = read_chats([path])
    assert len(found.conversations) == 30
    assert found.summary() == (
        "2 of 32 lines not used: not JSON (1: a.jsonl:31); the assistant says nothing (1: a.jsonl:32)"
    )
    with pytest.raises(DataError, match="2 of 3 lines not used"):
        read_chats([write(tmp_path / "b.jsonl", good, "{", "[]")])
    with pytest.raises(DataError, match="no conversation in it"):
        read_chats([write(tmp_path / "c.jsonl", "")])
    with pytest.raises(DataError, match=f"{tmp_path}/nope.jsonl: no such file"):
        read_chats([tmp_path / "nope.jsonl"])


def test_parts_of_text_are_joined_and_what_is_no_text_is_left_out(tmp_path: Path) -> None:
    """The content of OpenAI's API may be a list of parts; JSON may hold half of a surrogate pair."""
    parts: list[Any] = [{"type": "text", "text": "de"}, {"type": "text", "text": "f"}]
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    lines = [[{"role": "user", "content": c}, CHAT[2]] for c in (parts, [*parts, image], 7, "\ud800")]
    found = read_chats(
        [write(tmp_path / "a.jsonl", *[{"messages": CHAT}] * 30, *({"messages": m} for m in lines))]
    )
    assert found.conversations[30].messages == [CHAT[1], CHAT[2]]
    assert found.summary() == (
        "3 of 34 lines not used: content that is not text (2: a.jsonl:32, a.jsonl:33); "
        "half of a surrogate pair, which is no text (1: a.jsonl:34)"
    )


def test_what_the_template_refuses_is_left_out_up_to_a_limit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    form = "{% for m in messages %}{% if m.role == 'human' %}{{ raise_exception('who?') }}{% endif %}"
    template = ChatTemplate(form + "{{ m.content }}{% endfor %}")
    odd = {"messages": [{"role": "human", "content": "def"}, CHAT[2]]}
    found = read_chats([write(tmp_path / "a.jsonl", *[{"messages": CHAT}] * 10, odd)])
    assert len(found.examples(tokenizer, template)) == len(found.conversations) == 10
    assert re.search(r"1 of 11 lines not used: .*who\?.* \(1: a.jsonl:11\)", found.summary())
    found = read_chats([write(tmp_path / "b.jsonl", *[{"messages": CHAT}] * 3, odd)])
    with pytest.raises(DataError, match="1 of 4 lines not used"):
        found.examples(tokenizer, template)


def lengths(*sizes: int) -> list[Example]:
    """Examples of so many tokens, each with its own number as its token, learnt from the second on."""
    return [Example([i + 1] * n, [k > 0 for k in range(n)]) for i, n in enumerate(sizes)]


def test_examples_are_packed_whole_with_positions_and_documents_of_their_own() -> None:
    packs = Packs(lengths(5, 3, 4, 8, 2), batch_size=1, seq_len=7, seed=0)
    batches = packs.in_order()
    assert len(batches) == 3  # 22 tokens in rows of 8
    seen = []
    for batch in batches:
        ids, positions, documents = batch.ids[0], batch.positions[0], batch.document_ids[0]
        for document in documents.unique():
            at = documents == document
            assert ids[at].unique().numel() == 1
            assert positions[at].tolist() == list(range(int(at.sum())))
            if ids[at][0]:
                seen.append((int(ids[at][0]), int(at.sum())))
                assert batch.loss_mask[0][at].tolist() == [0.0] + [1.0] * (int(at.sum()) - 1)
            else:
                assert not batch.loss_mask[0][at].any()  # padding
    assert sorted(seen) == [(1, 5), (2, 3), (3, 4), (4, 8), (5, 2)]


def test_long_examples_are_cut_and_left_out_where_nothing_is_left_to_learn() -> None:
    late = Example([9] * 20, [False] * 15 + [True] * 5)
    packs = Packs([*lengths(12, 3), late], batch_size=1, seq_len=7, seed=0)
    assert packs.shortened == 2
    assert [len(e.ids) for e in packs.examples] == [8, 3]
    with pytest.raises(DataError, match="none of 1 examples has an answer within seq_len=7"):
        Packs([late], batch_size=1, seq_len=7, seed=0)


def test_a_position_comes_back_exactly() -> None:
    packs = Packs(lengths(*range(2, 9)), batch_size=2, seq_len=7, seed=3)
    for _ in range(5):
        next(packs)
    state = json.loads(json.dumps(packs.state_dict()))
    want = [next(packs) for _ in range(6)]
    again = Packs(lengths(*range(2, 9)), batch_size=2, seq_len=7, seed=3)
    again.load_state_dict(state)
    for a in want:
        b = next(again)
        assert all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
    with pytest.raises(ConfigError, match="seed=4: the saved position has 3"):
        Packs(lengths(*range(2, 9)), batch_size=2, seq_len=7, seed=4).load_state_dict(state)
