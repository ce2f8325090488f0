r"""Conversations as Gemma 4 sees them, and which of their tokens are the model's own.

    <bos><|turn>system\n{system}<turn|>\n<|turn>user\n{user}<turn|>\n<|turn>model\n{answer}<turn|>\n
                                                                                   ^^^^^^^^^^^^^^^

Marked: what the model is trained to say, its answers and the mark that ends each; everything else is
context. The newline after `<turn|>` is not: generation has stopped there.

Roles are system (or developer), user and model (or assistant). Contents are trimmed, and thoughts
(`<|channel>...<channel|>`) are taken out of the model's, as the released template does to turns that
are over. A mark inside a content is the text it spells, never a control token: nobody's message can
end a turn.

With thinking off, the templates of 12B, 26B A4B and 31B begin the answer they ask for with an empty
thought; `empty_thought` puts one, as context, before every answer. Those of E2B and E4B do not.

Sources: ai.google.dev/gemma/docs/core/prompt-formatting-gemma4 (the control tokens, the turns);
huggingface/trl `trl/chat_templates/gemma4_training.jinja` (the released template with its generated
parts marked: trimming, roles, thoughts; it also counts the newline after `<turn|>`); ollama/ollama
pull request 15560 (which sizes ask with an empty thought). Tools and media are not rendered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_qat.data.records import Record
from gemma_qat.data.tokenizer import Tokenizer
from gemma_qat.errors import InputError

Span = tuple[str | list[int], bool]
"""A text, or ids, and whether the model is to learn to say it."""

SYMBOLS = ("<|turn>", "<turn|>", "<|channel>", "<channel|>")
"""The pieces that a tokenizer needs for conversations."""

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "model", "model": "model",
}  # fmt: skip

_TOOLS = ("tool_calls", "tool_responses", "tools")

_THOUGHT = re.compile(r"<\|channel>.*?(<channel\|>|\Z)|<channel\|>", re.DOTALL)

# The place after the `<` of anything like `<|name>`, `<name|>` or `<|name|>`.
_INSIDE_MARK = re.compile(r"(?<=<)(?=\|[^\s<>]+>|[^\s<>|]+\|>)")


def chat_spans(record: Record, tokenizer: Tokenizer, empty_thought: bool = False) -> list[Span]:
    """Returns a conversation (`{'messages': [{'role', 'content'}]}`) as spans of ids and text, bos first.

    Raises: InputError naming the record for a role, a content or an order that the template does not
        have, or when the model says nothing in it; or for a tokenizer without the turn marks.
    """
    begin, end, open_thought, close_thought = (tokenizer.id_of(symbol) for symbol in SYMBOLS)
    spans: list[Span] = [([tokenizer.bos_id], False)]
    for role, content in _turns(record["messages"], record["path"]):
        is_model = role == "model"
        spans += [([begin], False), (f"{role}\n", False)]
        if is_model and empty_thought:
            spans += [([open_thought], False), ("thought\n", False), ([close_thought], False)]
        spans += [(part, is_model) for part in _INSIDE_MARK.split(content)]
        spans += [([end], is_model), ("\n", False)]
    return spans


def _turns(messages: Sequence[Any], where: str) -> list[tuple[str, str]]:
    turns: list[tuple[str, str]] = []
    for number, message in enumerate(messages):
        at = f"{where}: message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise InputError(f"{at}: expected an object with role and content")
        tools = [key for key in _TOOLS if message.get(key)]
        if tools:
            raise InputError(f"{at}: {tools[0]} are not rendered")
        role = _ROLES.get(str(message["role"]))
        if role is None:
            given = message["role"]
            raise InputError(f"{at}: role {given!r}, expected one of {', '.join(_ROLES)}")
        if role == "model" and turns and turns[-1][0] == "model":
            raise InputError(f"{at}: two answers of the model in a row")
        content = _text(message["content"], at)
        turns.append((role, _THOUGHT.sub("", content).strip() if role == "model" else content))
    if "model" not in [role for role, _ in turns]:
        raise InputError(f"{where}: nothing to learn, no message is the model's")
    return turns


def _text(content: Any, at: str) -> str:
    if isinstance(content, str):
        return content.strip()
    if isinstance(content, Sequence) and all(_is_text(part) for part in content):
        return "".join(part["text"].strip() for part in content)
    raise InputError(f"{at}: expected text, or a list of parts of type text")


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)
