"""A LiteRT model on the CPU of this machine, through its two signatures: what a phone's runtime computes.

The interpreter is that of `ai-edge-litert`; XNNPACK, which it uses on its own, is what phones use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gemma_qat.errors import InputError
from gemma_qat.export.litert.convert import EXTRA, one_line
from gemma_qat.export.litert.graph import DECODE, PREFILL

Caches = dict[str, np.ndarray]


def interpreter(path: Path, *, threads: int | None = None) -> Any:
    """Returns an interpreter of a model whose tensors have been allocated.

    Raises: InputError when the runtime is not installed or refuses the model, such as for an operation that it lacks.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise InputError(f"LiteRT is not installed ({error}): {EXTRA}") from None
    try:
        made = Interpreter(model_path=str(path), num_threads=threads)
        made.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"LiteRT's runtime refuses the model: {one_line(error)}") from None
    return made


class LiteRTModel:
    """A model of signatures `prefill` and `decode` with an int8 cache that its caller holds."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        """Loads a `.tflite` file; weights stay mapped.

        Raises: InputError as `interpreter` does, or when a signature is missing.
        """
        self._interpreter = interpreter(path, threads=threads)
        found = self._interpreter.get_signature_list()
        for name in (PREFILL, DECODE):
            if name not in found:
                raise InputError(
                    f"{path}: no signature {name}, it has {', '.join(found) or 'none'}"
                )
        self._prefill = self._interpreter.get_signature_runner(PREFILL)
        self._decode = self._interpreter.get_signature_runner(DECODE)
        details = self._prefill.get_input_details()
        self.chunk = int(details["tokens"]["shape"][1])
        self._caches = {
            name: tuple(details[name]["shape"]) for name in details if name.startswith("kv_cache_")
        }
        self.slots = int(next(iter(self._caches.values()))[2])
        self.vocab_size = int(self._decode.get_output_details()["logits"]["shape"][-1])

    def empty(self) -> Caches:
        """Returns caches with nothing in them."""
        return {name: np.zeros(shape, np.int8) for name, shape in self._caches.items()}

    def prefill(self, tokens: Int[np.ndarray, "N"], caches: Caches) -> Caches:
        """Returns the caches with all tokens of a prompt, from position 0 on.

        Chunks are read one after the other. The last one begins so that it ends with the prompt, over tokens that were
        read before: the same tokens at the same positions write the same codes, and nothing is written past the cache.
        """
        if len(tokens) > self.slots:
            raise InputError(f"a prompt of {len(tokens)} tokens, the cache has {self.slots} slots")
        self._check(tokens)
        for start in range(0, len(tokens), self.chunk):
            begin = max(0, min(start, len(tokens) - self.chunk))
            part = np.zeros(self.chunk, np.int32)
            given = tokens[begin : begin + self.chunk]
            part[: len(given)] = given
            positions = np.arange(begin, begin + self.chunk, dtype=np.int32)
            caches = _run(self._prefill, tokens=part[None], input_pos=positions, **caches)
        return caches

    def _check(self, tokens: Sequence[int] | Int[np.ndarray, "N"]) -> None:
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise InputError(f"token {token}, the model has 0 to {self.vocab_size - 1}")

    def decode(
        self, token: int, position: int, caches: Caches
    ) -> tuple[Float[np.ndarray, "V"], Caches]:
        """Returns (logits of the token after `token` at `position`, the caches with it)."""
        if not 0 <= position < self.slots:
            raise InputError(f"position {position}, the cache has slots 0 to {self.slots - 1}")
        self._check([token])
        tokens, positions = np.array([[token]], np.int32), np.array([position], np.int32)
        out = _run(self._decode, tokens=tokens, input_pos=positions, **caches)
        return out.pop("logits")[0, 0], out

    def logits(self, tokens: Sequence[int] | Int[np.ndarray, "N"]) -> Float[np.ndarray, "N V"]:
        """Returns the logits after every token, one `decode` a token."""
        caches, found = self.empty(), []
        for position, token in enumerate(tokens):
            one, caches = self.decode(int(token), position, caches)
            found.append(one)
        return np.stack(found)

    def steps(
        self,
        prompt: Sequence[int] | Int[np.ndarray, "P"],
        new: int,
        choose: Callable[[Float[np.ndarray, "V"]], int] = np.argmax,
    ) -> Iterator[int]:
        """Returns `new` tokens after a prompt, as they come, each as `choose` takes it from the logits: the likeliest.

        All but the last token of the prompt are read by `prefill`, the others by `decode`.
        Raises: InputError, now, for an empty prompt, or one that leaves no slots for as many.
        """
        if not len(prompt):
            raise InputError("an empty prompt, at least one token expected")
        if len(prompt) + new - 1 > self.slots:
            raise InputError(
                f"{len(prompt)} tokens and {new} new ones, the cache has {self.slots} slots"
            )
        return self._steps(np.asarray(prompt, np.int32), new, choose)

    def _steps(
        self, prompt: Int[np.ndarray, "P"], new: int, choose: Callable[[np.ndarray], int]
    ) -> Iterator[int]:
        caches, token = self.prefill(prompt[:-1], self.empty()), int(prompt[-1])
        for position in range(len(prompt) - 1, len(prompt) - 1 + new):
            logits, caches = self.decode(token, position, caches)
            token = int(choose(logits))
            yield token

    def generate(
        self, prompt: Sequence[int] | Int[np.ndarray, "P"], new: int
    ) -> Int[np.ndarray, "N"]:
        """Returns the `new` likeliest tokens after a prompt; raises as `steps` does."""
        return np.fromiter(self.steps(prompt, new), np.int32)


def _run(signature: Any, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Calls a signature: its tensors are allocated at the first call, and a delegate may refuse them."""
    try:
        found: dict[str, np.ndarray] = signature(**inputs)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"LiteRT's runtime refuses the model: {one_line(error)}") from None
    return found
