"""A program, run for the tests beside it: llama.cpp on one GGUF file. It may abort, so it is a process of its own.

    python llama_runs.py logits FILE TOKENS.npy OUT.npy      tokens int [B, T] -> float32 [B, T, V]
    python llama_runs.py tokenize FILE TEXTS.json OUT.json   texts -> ids, no begin-of-text added

Attention in float32 with a float32 cache, so that only what the file itself asks for is rounded.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp as L
import numpy as np


def quiet() -> Any:
    """Leaves errors and drops the rest of what llama.cpp says; the result must stay alive."""

    def say(level: int, text: bytes, _: Any) -> None:
        if level == 4:
            sys.stderr.write(text.decode(errors="replace"))

    callback = L.llama_log_callback(say)
    L.llama_log_set(callback, ctypes.c_void_p(0))
    return callback


def opened(path: str, vocabulary_only: bool = False) -> Any:
    parameters = L.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.vocab_only = vocabulary_only
    model = L.llama_model_load_from_file(path.encode(), parameters)
    if not model:
        raise SystemExit(f"llama.cpp refuses {path}")
    return model


def logits(path: str, tokens: np.ndarray) -> np.ndarray:
    model = opened(path)
    parameters = L.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max(64, tokens.shape[1])
    parameters.n_threads = parameters.n_threads_batch = 2
    parameters.type_k = parameters.type_v = 0  # GGML_TYPE_F32
    parameters.flash_attn_type = 0
    context = L.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit(f"llama.cpp makes no context for {path}")
    rows = []
    for row in tokens:
        L.llama_memory_clear(L.llama_get_memory(context), True)
        rows.append(_row(context, row, L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))))
    return np.stack(rows)


def _row(context: Any, tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    batch = L.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, 1
    status = L.llama_decode(context, batch)
    if status:
        raise SystemExit(f"llama_decode: {status}")
    found = [L.llama_get_logits_ith(context, i) for i in range(len(tokens))]
    out = np.stack([np.ctypeslib.as_array(row, (vocabulary,)).copy() for row in found])
    L.llama_batch_free(batch)
    return out


def tokenize(path: str, texts: list[str]) -> list[list[int]]:
    vocabulary = L.llama_model_get_vocab(opened(path, vocabulary_only=True))
    found = []
    for text in texts:
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 8))()
        count = L.llama_tokenize(vocabulary, raw, len(raw), room, len(room), False, False)
        found.append(list(room[:count]))
    return found


def main() -> None:
    what, path, given, out = sys.argv[1:]
    L.llama_backend_init()
    callback = quiet()
    if what == "logits":
        np.save(out, logits(path, np.load(given)))
    else:
        Path(out).write_text(json.dumps(tokenize(path, json.loads(Path(given).read_text()))))
    del callback


if __name__ == "__main__":
    main()
