"""A `.litertlm` bundle: the model, its tokenizer, and what LiteRT-LM has to know to hold a conversation with it.

    tokenizer    the file it came from, a SentencePiece model or a tokenizer.json
    metadata     start and stop tokens, slots of the cache; the chat template and the marks of its turns, if it has them

Source: `runtime/proto/llm_metadata.proto` in google-ai-edge/LiteRT-LM.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gemma_qat.errors import InputError
from gemma_qat.export.artifact import Artifact, Vocabulary
from gemma_qat.export.litert.convert import EXTRA

SUFFIX, MAGIC = ".litertlm", b"LITERTLM"
_MODEL = "tf_lite_prefill_decode"
_TURN, _TURN_END = "<|turn>", "<turn|>"


@runtime_checkable
class TokenizerFile(Vocabulary, Protocol):
    """A vocabulary with the bytes of the file it came from."""

    model: bytes


def check_tokenizer(artifact: Artifact) -> TokenizerFile:
    """Returns the tokenizer that goes into a bundle.

    Raises: InputError when there is none, or it is another model's.
    """
    tokenizer = artifact.tokenizer
    if not isinstance(tokenizer, TokenizerFile):
        raise InputError(
            "a .litertlm bundle holds a tokenizer, and none is given: --tokenizer FILE"
        )
    found = len(tokenizer.pieces())
    if found > artifact.config.vocab_size:
        raise InputError(
            f"the tokenizer has {found} pieces, the model {artifact.config.vocab_size}: it is another model's"
        )
    return tokenizer


def write_bundle(artifact: Artifact, model: Path, out: Path, slots: int) -> int:
    """Writes a bundle of a `.tflite` model with `slots` in its cache and returns its bytes.

    Raises: InputError where the extra is not installed, or as `check_tokenizer` does.
    """
    builder, metadata = _tools()
    tokenizer = check_tokenizer(artifact)
    said = _metadata(metadata.LlmMetadata(), artifact, tokenizer, slots)
    with tempfile.TemporaryDirectory() as folder:
        about, vocabulary = Path(folder, "metadata.pb"), Path(folder, "tokenizer.json")
        about.write_bytes(said.SerializeToString())
        vocabulary.write_bytes(tokenizer.model)
        made = builder.LitertLmFileBuilder()
        made.add_system_metadata(
            builder.Metadata(key="Authors", value="gemma_qat", dtype=builder.DType.STRING)
        )
        made.add_llm_metadata(str(about))
        if tokenizer.model.lstrip()[:1] == b"{":
            made.add_hf_tokenizer(str(vocabulary))
        else:
            made.add_sentencepiece_tokenizer(str(vocabulary))
        made.add_tflite_model(str(model), builder.TfLiteModelType(_MODEL))
        with out.open("wb") as stream:
            made.build(stream)
    return out.stat().st_size


def _tools() -> tuple[Any, Any]:
    try:
        from litert_lm_builder import litertlm_builder
        from litert_lm_builder.runtime.proto import llm_metadata_pb2
    except ImportError as error:
        raise InputError(f"litert-lm-builder is not installed ({error}): {EXTRA}") from None
    return litertlm_builder, llm_metadata_pb2


def _metadata(said: Any, artifact: Artifact, tokenizer: TokenizerFile, slots: int) -> Any:
    pieces = {text: number for number, (text, _, _) in enumerate(tokenizer.pieces())}
    if tokenizer.bos_id >= 0:
        said.start_token.token_ids.ids.append(tokenizer.bos_id)
    for stop in (tokenizer.eos_id, pieces.get(_TURN_END, -1)):
        if stop >= 0:
            said.stop_tokens.add().token_ids.ids.append(stop)
    said.max_num_tokens = slots
    said.supports_thinking = said.supports_function_calling = False
    if _TURN in pieces and _TURN_END in pieces:
        said.llm_model_type.gemma4.SetInParent()
        for role in ("user", "model", "system"):
            turn = getattr(said.prompt_templates, role)
            turn.prefix, turn.suffix = f"{_TURN}{role}\n", f"{_TURN_END}\n"
    else:
        said.llm_model_type.generic_model.SetInParent()
    if artifact.chat_template is not None:
        said.jinja_prompt_template = artifact.chat_template
    return said


def model_within(path: Path) -> tuple[int, int]:
    """Returns (begin, end) of the model in a file: of the section of a bundle, or the whole of a `.tflite`.

    Raises: InputError for a bundle that is not whole or holds no decoder.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        front = file.read(32)
        if front[:8] != MAGIC:
            return 0, size
        _tools()
        from litert_lm_builder import litertlm_header_schema_py_generated as schema

        length = int.from_bytes(front[24:32], "little") - len(front)
        header = file.read(length) if 0 < length <= size else b""
    try:
        sections = schema.LiteRTLMMetaData.GetRootAs(header, 0).SectionMetadata()
        for index in range(sections.ObjectsLength()):
            section = sections.Objects(index)
            begin, end = section.BeginOffset(), section.EndOffset()
            is_model = section.DataType() == schema.AnySectionDataType.TFLiteModel
            if is_model and 0 < begin < end <= size:
                return begin, end
    except Exception as error:  # offsets that lead nowhere raise many things
        raise InputError(f"{path}: not a bundle that is whole ({error})") from None
    raise InputError(f"{path}: no model in this bundle, or it is cut off")
