"""The tokenizer in a GGUF file as the files that a hub directory has: the way back of `gguf_vocab.py`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from gemma_qat.export.gguf_vocab import KINDS, MODEL, TEMPLATE, VISIBLE

_ENDS = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}


def tokenizer_files(keys: Mapping[str, Any]) -> dict[str, Callable[[], bytes]]:
    """Returns what makes tokenizer.json, tokenizer_config.json and chat_template.jinja, of those that the keys hold."""
    found: dict[str, Callable[[], bytes]] = {}
    tokens, merges = keys.get("tokenizer.ggml.tokens"), keys.get("tokenizer.ggml.merges")
    if keys.get("tokenizer.ggml.model") == MODEL and tokens is not None and merges is not None:
        found["tokenizer.json"] = functools.partial(_tokenizer, keys)
        found["tokenizer_config.json"] = functools.partial(_config, keys)
    template = keys.get(TEMPLATE)
    if isinstance(template, str):
        found["chat_template.jinja"] = functools.partial(template.encode, "utf-8")
    return found


def _tokenizer(keys: Mapping[str, Any]) -> bytes:
    tokens = [str(token) for token in keys["tokenizer.ggml.tokens"]]
    names = {number: kind for kind, number in KINDS.items()}
    kinds = [names.get(int(kind), "normal") for kind in keys["tokenizer.ggml.token_type"]]
    pairs = [str(merge).split(" ", 1) for merge in keys["tokenizer.ggml.merges"]]
    added = [
        {
            "id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind != "user_defined" or text in VISIBLE,
        }
        for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in ("control", "unknown", "user_defined")
    ]  # fmt: skip
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    unknown = next((t for t, kind in zip(tokens, kinds, strict=True) if kind == "unknown"), None)
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": space,
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": "byte" in kinds,
            "ignore_merges": False, "vocab": {text: i for i, text in enumerate(tokens)}, "merges": pairs,
        },
    }  # fmt: skip
    return json.dumps(whole, ensure_ascii=False).encode("utf-8")


def _config(keys: Mapping[str, Any]) -> bytes:
    tokens = keys["tokenizer.ggml.tokens"]
    ids = {name: keys.get(f"tokenizer.ggml.{end}_token_id") for end, name in _ENDS.items()}
    said = {
        name: str(tokens[int(i)])
        for name, i in ids.items()
        if i is not None and 0 <= int(i) < len(tokens)
    }
    return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **said}, indent=1).encode()
