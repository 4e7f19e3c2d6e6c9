"""Templates say what the model expects, leave a prefix open, and stay in their box."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rorqual.errors import TokenizerError
from rorqual.text.template import BUILT_IN, ChatTemplate

TOKENS = {"bos_token": "<B>", "eos_token": "<E>"}
HI = [{"role": "user", "content": "hi"}]
OPEN = [*HI, {"role": "assistant", "content": "The answer is", "prefix": True}]


def test_deepseek_v2_form() -> None:
    """The V2 README: system text after BOS, no space after the last colon."""
    t = ChatTemplate.built_in("deepseek-v2", TOKENS)
    got = t.render([{"role": "system", "content": "S"}, *HI, {"role": "assistant", "content": "A"}, *HI])
    assert got == "<B>S\n\nUser: hi\n\nAssistant: A<E>User: hi\n\nAssistant:"


def test_deepseek_v3_form() -> None:
    t = ChatTemplate.built_in("deepseek-v3", TOKENS)
    got = t.render(
        [{"role": "system", "content": "S"}, *HI, {"role": "assistant", "content": "A"}, *HI], thinking=True
    )
    assert got == "<B>S<｜User｜>hi<｜Assistant｜>A<E><｜User｜>hi<｜Assistant｜><think>\n"
    assert t.render(HI) == "<B><｜User｜>hi<｜Assistant｜>"


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_prefix_is_left_open(name: str) -> None:
    """deepseek-ai/DeepSeek-R1#459: the prompt ends with the text, no end token, no second tag."""
    t = ChatTemplate.built_in(name, TOKENS)
    got = t.render(OPEN)
    assert got.endswith("The answer is")
    assert not got.endswith("<E>")
    tag = {"chatml": "<|im_start|>assistant", "deepseek-v2": "Assistant:", "deepseek-v3": "<｜Assistant｜>"}[
        name
    ]
    assert got.count(tag) == 1


def test_a_strangers_template_leaves_a_prefix_open_too() -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
    assert ChatTemplate(source).render(OPEN) == "[user]hi[/][assistant]The answer is"


def test_a_template_that_trims_the_prefix_is_refused() -> None:
    source = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(TokenizerError, match="cannot be continued"):
        ChatTemplate(source).render(OPEN)


def test_helpers_of_published_templates() -> None:
    source = (
        "{%- set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% generation %}{{ m.content | tojson }}{% endgeneration %}{% endfor %}{{ ns.n }}"
    )
    assert (
        ChatTemplate(source).render([*HI, {"role": "x", "content": "y"}], add_generation_prompt=False)
        == '"hi"1'
    )
    with pytest.raises(TokenizerError, match="alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(HI)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 'a' * 999999999 }}",
        "{{ 'a'.ljust(999999999) }}",
        "{{ '%999999999d' % 1 }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set x = 'a' * 99999 %}{{ x | replace('a', x) }}",
        "{% set x = 'a' * 99999 %}{{ x.replace('a', x) }}",
        "{% set x = 'a' * 99999 %}{{ [x] * 99999 | join }}",
        "{% set x = 'a' * 99999 %}{{ ''.join([x] * 99999) }}",
        "{{ ('a\n' * 99999) | indent(99999) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ strftime_now('%999999999d') }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set ns = namespace(x='a' * 99999) %}{% for i in range(60) %}"
        "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0].items.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__dict__ }}",
        "{% include 'x' %}",
        "{% for",
        "{{ undefined_thing.x }}",
    ],
)
def test_hostile_and_broken_templates_end_in_an_error(source: str) -> None:
    begin = time.monotonic()
    with pytest.raises(TokenizerError):
        ChatTemplate(source).render(HI)
    assert time.monotonic() - begin < 20  # it ended at all


def test_a_template_that_only_takes_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few turns, each of them slow: the deadline ends it, and in a thread that takes no signals."""
    monkeypatch.setattr("rorqual.text.sandbox.MAX_SECONDS", 0.2)
    slow = ChatTemplate("{% for i in range(99999) %}{% if range(99999) | sum == i %}x{% endif %}{% endfor %}")
    with ThreadPoolExecutor(1) as pool, pytest.raises(TokenizerError, match="seconds"):
        pool.submit(slow.render, HI).result(timeout=60)


def test_a_long_conversation_fits_the_budget() -> None:
    turns = [{"role": "user", "content": "x" * 1000}, {"role": "assistant", "content": "y" * 1000}] * 1000
    assert len(ChatTemplate.built_in("chatml").render(turns)) > 2_000_000


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].since | tojson }}",
        "{{ messages[0].since | string }}",
        "{{ messages[0].missing | default(messages[0].since) }}",
        "{% macro show(v) %}{{ v }}{% endmacro %}{{ show(messages[0].since) }}",
        "{% set ns = namespace(v=messages[0].since) %}{{ ns.v }}",
        "{{ messages[0].get('missing', messages[0].since) }}",
    ],
)
def test_a_large_number_in_a_conversation_is_only_a_value(source: str) -> None:
    messages = [{"role": "user", "content": "x", "since": 1732579200}]
    assert ChatTemplate(source).render(messages) == "1732579200"


def test_the_callers_messages_are_never_changed() -> None:
    messages = [{"role": "user", "content": "hi", "tool_calls": [{"a": 1}]}]
    before = json.dumps(messages)
    ChatTemplate.built_in("chatml").render(messages)
    ChatTemplate.built_in("chatml").render([*messages, dict(OPEN[1])])
    assert json.dumps(messages) == before


def test_where_a_folders_template_comes_from(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    config = {
        "chat_template": [
            {"name": "tool", "template": "T"},
            {"name": "default", "template": "D{{ bos_token }}"},
        ]
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": {"content": "<B>"}}))
    loaded = ChatTemplate.load(tmp_path)
    assert loaded is not None
    assert loaded.render(HI) == "D<B>"
    (tmp_path / "chat_template.jinja").write_text("J")
    again = ChatTemplate.load(tmp_path)
    assert again is not None
    assert again.render(HI) == "J"


def test_no_messages_is_an_error() -> None:
    with pytest.raises(TokenizerError, match="at least one"):
        ChatTemplate.built_in("chatml").render([])
