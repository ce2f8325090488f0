"""SentencePiece models: loaded, or trained with Gemma's special ids.

    id      piece     kind
    0       <pad>     control
    1       </s>      control     (end of sequence: `eos`)
    2       <s>       control     (start of sequence: `bos`)
    3       <unk>     unknown
    4       <mask>    control
    5       newline   user_defined
    6-261   <0x00>..  byte
    262-    learned   normal

A trained model is lossless: `decode(encode(text)) == text` for every text that utf-8 can hold. That
takes the identity normalization, no dummy prefix, no removed spaces, a piece for the newline, and
bytes for every character outside the vocabulary. One character needs care here: SentencePiece
stores a space as U+2581, so a literal U+2581 in the text would come back as a space; it is written
as its three utf-8 bytes instead.

Source: Kudo and Richardson, "SentencePiece" (arXiv:1808.06226); special ids as in Gemma's
tokenizer.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.data.tokenizer import Kind, Piece, Tokenizer
from gemma_qat.errors import InputError

# `ModelProto.SentencePiece.Type` in sentencepiece_model.proto; 5 (unused) reads as normal.
_KINDS: dict[int, Kind] = {2: "unknown", 3: "control", 4: "user_defined", 6: "byte"}

_TRAINING: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    # Gemma's special ids.
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "control_symbols": ["<mask>"],
    # Lossless: every space is kept; the newline is a symbol, given where a model is trained.
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "max_sentence_length": 1 << 24,  # the default, 4192 bytes, silently drops longer lines
    # Deterministic and quiet.
    "num_threads": 1,
    "minloglevel": 2,
}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    def __init__(self, model: bytes) -> None:
        """Wraps a serialized SentencePiece model; `Tokenizer.load` reads one from a file.

        Raises: RuntimeError for bytes that are none.
        """
        import sentencepiece

        self.model = model
        self._processor = own = sentencepiece.SentencePieceProcessor()
        own.load_from_serialized_proto(model)  # unlike `model_proto=`, refuses b""
        super().__init__(
            vocab_size=own.vocab_size(), bos=own.bos_id(), eos=own.eos_id(), pad=own.pad_id(), unk=own.unk_id(),
        )  # fmt: skip

    def _encode_parts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self._processor.encode(list(texts), return_type="numpy")

    def _find(self, piece: str) -> int | None:
        found = self._processor.piece_to_id(piece)
        return found if self._processor.id_to_piece(found) == piece else None

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; control ids (padding, bos, eos) give none.

        Raises: IndexError for an id outside the vocabulary.
        """
        return self._processor.decode([int(i) for i in ids])

    def pieces(self) -> list[Piece]:
        """Returns (text, score, kind) of every id in order, as stored in the model."""
        return [Piece(p.piece, p.score, _KINDS.get(p.type, "normal")) for p in self._proto().pieces]

    def _proto(self) -> Any:
        from sentencepiece import sentencepiece_model_pb2

        messages: Any = sentencepiece_model_pb2  # made at import, so unknown to type checkers
        return messages.ModelProto.FromString(self.model)

    def merges(self) -> list[tuple[str, str]]:
        """Returns the pairs of pieces that join, the first to be joined first.

        The model holds scores, not merges: a piece that is two other pieces in a row is a merge of them, and
        SentencePiece, which always joins the neighbours whose union scores highest, does them in the order of the
        union's score. A piece with several such cuts gives several merges, one after the other.

        User-defined pieces (Gemma's runs of spaces) are never merged by SentencePiece, which cuts them out first, the
        longest where several fit. For readers that only know merges theirs come first, those with the longest left
        side before others: a run then grows from its left as far as there are pieces.
        """
        proto = self._proto()
        if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
            return []
        pieces = self.pieces()
        kinds = ("normal", "user_defined")
        ids = {text: i for i, (text, _, kind) in enumerate(pieces) if kind in kinds}
        found: list[tuple[Any, ...]] = []
        for text, i in ids.items():
            for cut in range(1, len(text)):
                left, right = text[:cut], text[cut:]
                if left in ids and right in ids:
                    own = pieces[i].kind == "user_defined"
                    order = (
                        (0.0, -len(left), -len(right)) if own else (-pieces[i].score, i, ids[left])
                    )
                    found.append((not own, *order, ids[right], (left, right)))
        return [merge for *_, merge in sorted(found)]


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, out: Path, symbols: Sequence[str] = ()
) -> SentencePieceTokenizer:
    """Trains a byte-fallback BPE model on `texts`, writes it to `out` and returns it.

    `symbols` become pieces of their own after the newline, as the marks of a chat template must be.
    The file appears under its name only when complete.

    Raises: ValueError if the texts are empty or too small for `vocab_size`, or `vocab_size` too
        small for the special and byte pieces.
    Exactness: the same texts in the same order give the same bytes (one thread, no sampling; merges
        are chosen by count).
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            user_defined_symbols=["\n", *symbols],
            **_TRAINING,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", maxsplit=1)[-1].strip() or "the texts are empty"
        raise InputError(f"tokenizer {out}: vocabulary of {vocab_size}: {reason}") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.write_bytes(model.getvalue())
    partial.replace(out)
    return SentencePieceTokenizer(model.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of all texts: a newline is a piece of its own, so no learned piece crosses one."""
    return (line for text in texts for line in text.split("\n") if line)
