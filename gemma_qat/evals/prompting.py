"""Prompts as text, for tools that know nothing but text: `<bos>` exactly once, conversations by a chat template.

A template gives text in which some marks are control tokens (`<|turn>`, which it wrote) and others are text (the same
letters in somebody's message). They are told apart by a character that no text has, put into the marks of every message
before the template sees it:

    message       see <|turn> there        ->  see <U+FDD0|turn> there
    rendered      <bos><|turn>user\\nsee <U+FDD0|turn> there<turn|>\\n
    tokens        control control ...      text ...        control

U+FDD0 is a noncharacter of Unicode, meant for a program's own use.

Source: huggingface/transformers, `utils/chat_template_utils.py`: how templates are run, and how a last message is left
open. Their tokenizers take every mark in a prompt for a control token, whoever wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_qat.data.tokenizer import Tokenizer
from gemma_qat.errors import InputError

_APART = "\ufdd0"
_MARK = re.compile(r"<[^\s<>]+>")

TURN_END = "<turn|>"


class PromptText:
    """A tokenizer as benchmarks need it, with a chat template or without one.

    Without a template text is text: only `<bos>` at its very beginning is what it says.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        """Raises: InputError for a tokenizer without `bos`, or a template that is none."""
        if tokenizer.bos_id < 0:
            raise InputError("tokenizer: no piece starts a text, and Gemma's texts start with one")
        self.tokenizer, self.template = tokenizer, template
        pieces = tokenizer.pieces()
        self.bos = pieces[tokenizer.bos_id].text
        self.eos = pieces[tokenizer.eos_id].text
        self._ids = {
            piece.text: i
            for i, piece in enumerate(pieces)
            if piece.kind in ("control", "user_defined") and _MARK.fullmatch(piece.text)
        }
        longest_first = sorted(map(re.escape, self._ids), key=len, reverse=True)
        self._marks = re.compile(f"({'|'.join(longest_first)})")
        self._render = None if template is None else _compiled(template)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end an answer: the end of a text, and of a turn where there are turns."""
        turn = self._ids.get(TURN_END)
        return (self.tokenizer.eos_id,) if turn is None else (self.tokenizer.eos_id, turn)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Returns the ids of a text; a `<bos>` that it begins with counts as one that was asked for."""
        bare = text
        while bare.startswith(self.bos):
            bare = bare.removeprefix(self.bos)
        begins = bos or bare != text
        return [self.tokenizer.bos_id] * begins + self._encode(bare)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; control ids give none."""
        return self.tokenizer.decode(ids)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """Returns a conversation as the template writes it, with the beginning of an answer or its last left open.

        Raises: InputError without a template, or for what the template refuses.
        """
        if self._render is None:
            raise InputError("no chat template travels with the checkpoint; run without one")
        apart = [{**message, "content": self._apart(message["content"])} for message in messages]
        text: str = self._render(
            messages=apart, add_generation_prompt=add_generation_prompt,
            bos_token=self.bos, eos_token=self.eos,
        )  # fmt: skip
        if add_generation_prompt:
            return text
        last = apart[-1]["content"].strip()
        place = text.rfind(last)
        if place < 0:
            raise InputError("the chat template does not write the last message as it is")
        return text[: place + len(last)]

    def _apart(self, content: str) -> str:
        return self._marks.sub(lambda found: found[0][0] + _APART + found[0][1:], content)

    def _encode(self, whole: str) -> list[int]:
        if self.template is None:
            return self.tokenizer.encode(whole)
        ids: list[int] = []
        for part in self._marks.split(whole):
            if part in self._ids:
                ids.append(self._ids[part])
            else:
                texts = self.tokenizer.encode_all([p for p in part.split(_APART) if p])
                ids += [int(i) for text in texts for i in text]
        return ids


def _compiled(template: str) -> Any:
    """Returns the function that renders a template, in jinja's sandbox."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}

    def render(**names: Any) -> str:
        try:
            return compiled.render(**names)
        except TemplateError as error:
            raise InputError(f"chat template: {error}") from None

    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise InputError(f"chat template: {error}") from None
    return render


def _refuse(message: str) -> None:
    raise InputError(f"chat template: {message}")


def _now(form: str) -> str:
    import datetime

    return datetime.datetime.now().strftime(form)
