"""Conversations as token ids with a mask of the assistant's words, cut exactly where inference would cut."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rorqual.errors import DataError, TokenizerError
from rorqual.text.template import ChatTemplate
from rorqual.text.tokenizer import Tokenizer

MAX_MALFORMED = 0.1  # share of lines that may be unusable before it is a fault of the file
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Example:
    """A conversation, or its beginning up to one answer: `mask` is true on the tokens that the assistant says, its end
    token among them."""

    ids: list[int]
    mask: list[bool]


class Conversation(NamedTuple):
    """A line of a file, and where it stands."""

    messages: Messages
    tools: Any
    where: str


@dataclass
class Read:
    """Conversations of files, and what could not be used, by reason with the first places."""

    paths: Sequence[Path]
    conversations: list[Conversation] = field(default_factory=list)
    lines: int = 0
    bad: dict[str, list[str]] = field(default_factory=dict)

    def refuse(self, reason: str, where: str) -> None:
        self.bad.setdefault(reason, []).append(where)

    def check(self) -> None:
        """Raises DataError where too many lines cannot be used, or none is left."""
        bad = sum(map(len, self.bad.values()))
        if bad > MAX_MALFORMED * self.lines or not self.conversations:
            raise DataError(
                f"{', '.join(map(str, self.paths))}: {self.summary() if bad else 'no conversation in it'}"
            )

    def examples(self, tokenizer: Tokenizer, template: ChatTemplate) -> list[list[Example]]:
        """Those of each conversation. What the template refuses is left out; raises as `check` does."""
        made, kept = [], []
        for chat in self.conversations:
            try:
                made.append(list(examples(chat.messages, chat.tools, tokenizer, template)))
                kept.append(chat)
            except TokenizerError as e:
                self.refuse(str(e), chat.where)
        self.conversations = kept
        self.check()
        return made

    def summary(self) -> str:
        """`3 of 90 lines not used: not JSON (1: a.jsonl:4); …`."""
        often = sorted(self.bad.items(), key=lambda item: -len(item[1]))[:5]
        shown = [f"{reason} ({len(places)}: {', '.join(places[:3])})" for reason, places in often]
        shown += ["…"] * (len(self.bad) > len(often))
        return f"{sum(map(len, self.bad.values()))} of {self.lines} lines not used: {'; '.join(shown)}"


def read_chats(paths: Sequence[Path]) -> Read:
    """JSON lines of {"messages": [{"role", "content"}, …], "tools": …}. Raises DataError where a file is missing, too
    many lines cannot be used, or none is left."""
    found = Read(paths)
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path.resolve()}: no such file; give JSON lines of conversations")
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                if raw.strip():
                    found.lines += 1
                    _read_line(raw, f"{path.name}:{number}", found)
    found.check()
    return found


def _read_line(raw: bytes, where: str, found: Read) -> None:
    try:
        tree = json.loads(raw)
        json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return found.refuse("half of a surrogate pair, which is no text", where)
    except ValueError:
        return found.refuse("not JSON", where)
    messages = tree.get("messages") if isinstance(tree, dict) else None
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        return found.refuse('no list "messages" of objects with a role', where)
    if not any(m["role"] == "assistant" for m in messages):
        return found.refuse("the assistant says nothing", where)
    messages = [m | {"content": _text(m.get("content"))} if "content" in m else m for m in messages]
    if not all(isinstance(m.get("content"), str | None) for m in messages):
        return found.refuse("content that is not text", where)
    found.conversations.append(Conversation(messages, tree.get("tools"), where))
    return None


def _text(content: Any) -> Any:
    """The text of a list of parts, as OpenAI's API writes it; anything else as it is."""
    parts = content if isinstance(content, list) else []
    texts = [p["text"] for p in parts if isinstance(p, dict) and p.get("type") == "text" and "text" in p]
    whole = parts and len(texts) == len(parts) and all(isinstance(t, str) for t in texts)
    return "".join(texts) if whole else content


def examples(
    messages: Messages, tools: Any, tokenizer: Tokenizer, template: ChatTemplate
) -> Iterator[Example]:
    """One example of the whole conversation; where the template tells earlier turns otherwise once later ones follow
    (reasoning that is dropped), one example for each answer, so that each is learnt as it will be asked for."""
    whole = template.render(messages, tools, add_generation_prompt=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:i], tools, add_generation_prompt=True) if i else ""
        after = template.render(messages[: i + 1], tools, add_generation_prompt=False)
        if not after.startswith(before):
            raise TokenizerError(
                f"{template.origin}: the prompt for an answer is not how the answered conversation begins"
            )
        spans.append((before, after))
    if all(whole.startswith(after) for _, after in spans):
        cuts = [(len(before), len(after)) for before, after in spans]
        yield _tokenized(whole, cuts, tokenizer)
    else:
        for before, after in spans:
            yield _tokenized(after, [(len(before), len(after))], tokenizer)


def _tokenized(text: str, spans: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> Example:
    """Each part by itself: at inference the prompt is tokenised without its answer, so no token may cross over."""
    ids: list[int] = []
    mask: list[bool] = []
    at = 0
    for begin, end in spans:
        prompt = tokenizer.encode(text[at:begin], add_bos=False)
        answer = tokenizer.encode(text[begin:end], add_bos=False)
        ends = [i for i, token in enumerate(answer) if token in tokenizer.eos_ids]
        said = ends[-1] + 1 if ends else len(answer)  # a line feed behind the end token is never generated
        ids += prompt + answer
        mask += [False] * len(prompt) + [i < said for i in range(len(answer))]
        at = end
    return Example(ids, mask)
