"""Chat templates: a conversation as the prompt that its model was trained on.

Templates come from strangers with their checkpoints; they run in the sandbox of `rorqual.text.sandbox`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

from rorqual.errors import TokenizerError
from rorqual.text.sandbox import environment, rendering

Message = Mapping[str, Any]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"
    "{% if not loop.last or not m.prefix %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEEPSEEK_V2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content + '\\n\\n' }}"
    "{% elif m.role == 'user' %}{{ 'User: ' + m.content + '\\n\\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + (m.content or '') }}"
    "{% if not loop.last or not m.prefix %}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
DEEPSEEK_V3 = (
    "{% set think = thinking is defined and thinking %}"
    "{{ bos_token }}"
    "{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n') }}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' }}"
    "{% if m.prefix and m.reasoning_content %}"
    "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n' }}{% endif %}"
    "{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}"
    "{% if loop.first %}{{ '<｜tool▁calls▁begin｜>' }}{% endif %}"
    "{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name }}"
    "{{ '\\n```json\\n' + call.function.arguments + '\\n```<｜tool▁call▁end｜>' }}"
    "{% if loop.last %}{{ '<｜tool▁calls▁end｜>' }}{% endif %}{% endfor %}"
    "{% if not loop.last or not m.prefix %}{{ eos_token }}{% endif %}"
    "{% elif m.role == 'tool' %}"
    "{{ '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + m.content"
    " + '<｜tool▁output▁end｜><｜tool▁outputs▁end｜>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<｜Assistant｜>' }}{% if think %}{{ '<think>\\n' }}{% endif %}{% endif %}"
)
BUILT_IN = {"chatml": CHATML, "deepseek-v2": DEEPSEEK_V2, "deepseek-v3": DEEPSEEK_V3}


class ChatTemplate:
    """One compiled template with the special tokens that it may write."""

    def __init__(
        self, source: str, tokens: Mapping[str, str] | None = None, origin: str = "chat template"
    ) -> None:
        self.source = source
        self.origin = origin  # where it came from, for messages and for `inspect`
        self.tokens = {"bos_token": "", "eos_token": "", **(tokens or {})}
        try:
            self._template = environment().from_string(source)
        except (TemplateError, RecursionError, ValueError) as e:
            line = f" in line {e.lineno}" if isinstance(e, TemplateSyntaxError) else ""
            raise TokenizerError(f"{origin}: not a valid jinja2 template{line} ({e})") from e

    @classmethod
    def load(cls, folder: str | Path) -> ChatTemplate | None:
        """The template of a model folder: chat_template.jinja, or chat_template in tokenizer_config.json (its
        default, where several are named). None where the folder has none."""
        from rorqual.text.tokenizer import read_json

        folder = Path(folder)
        config = read_json(folder / "tokenizer_config.json")
        tokens = {k: _content(v) for k, v in config.items() if k.endswith("_token") and _content(v)}
        path = folder / "chat_template.jinja"
        if path.is_file():
            return cls(path.read_text(encoding="utf-8"), tokens, str(path.resolve()))
        source = config.get("chat_template")
        if isinstance(source, list):
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default") or next(iter(named.values()), None)
        if source is None:
            return None
        if not isinstance(source, str):
            raise TokenizerError(
                f"{folder.resolve()}: chat_template must be text, not {type(source).__name__}"
            )
        return cls(source, tokens, f"{folder.resolve()}/tokenizer_config.json chat_template")

    @classmethod
    def built_in(cls, name: str, tokens: Mapping[str, str] | None = None) -> ChatTemplate:
        """One of our own: chatml, deepseek-v2 or deepseek-v3."""
        return cls(BUILT_IN[name], tokens, f"built-in {name} template")

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
        **extra: Any,
    ) -> str:
        """The prompt. A last assistant message with `prefix: True` is left open: the prompt ends with its
        text.

        Raises TokenizerError where the template refuses the conversation, fails or exceeds its budget.
        """
        if not messages:
            raise TokenizerError("messages: at least one is needed")
        opened = (
            messages[-1] if messages[-1].get("role") == "assistant" and messages[-1].get("prefix") else None
        )
        context: dict[str, Any] = {**self.tokens, **extra, "tools": tools}
        if thinking is not None:
            context |= {"thinking": thinking, "enable_thinking": thinking}
        if opened is None:
            return self._render([dict(m) for m in messages], add_generation_prompt, context)
        return self._open_ended([dict(m) for m in messages], str(opened.get("content") or ""), context)

    def _open_ended(self, messages: list[dict[str, Any]], content: str, context: dict[str, Any]) -> str:
        """Render with a mark at the end of the prefix and cut there, so that no template needs to know of
        it."""
        mark = "\u241eprefix ends here\u241e"
        messages[-1]["content"] = content + mark
        text = self._render(messages, False, context)
        start, found, _ = text.rpartition(mark)
        if not found:
            raise TokenizerError(
                f"{self.origin}: leaves out the last assistant message, so it cannot be continued"
            )
        if not start.endswith(content):  # the template trimmed or changed what it was given
            raise TokenizerError(f"{self.origin}: changes the text of the prefix, so it cannot be continued")
        return start

    def _render(self, messages: list[dict[str, Any]], generation: bool, context: dict[str, Any]) -> str:
        try:
            with rendering():
                return self._template.render(messages=messages, add_generation_prompt=generation, **context)
        except SecurityError as e:
            raise TokenizerError(f"{self.origin}: refused in the sandbox ({e})") from e
        except (
            TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            IndexError,
            RecursionError,
            ArithmeticError,
            MemoryError,
        ) as e:
            raise TokenizerError(f"{self.origin}: does not accept this conversation ({e})") from e


def _content(token: Any) -> str:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
