"""From StableHLO to one LiteRT graph, by LiteRT's own converter, and what the converter cannot do in one line."""

from __future__ import annotations

from typing import Any

from gemma_qat.errors import InputError

EXTRA = "pip install 'gemma_qat[litert]'"


_LONGEST = 300


def one_line(error: Exception) -> str:
    """Returns what an error of LiteRT's says, which is many lines, as the beginning of one."""
    return " ".join(str(error).split())[:_LONGEST]


def schema() -> Any:
    """Returns the classes of the file format.

    Raises: InputError where the extra is not installed.
    """
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise InputError(f"LiteRT is not installed ({error}): {EXTRA}") from None
    return schema_py_generated


def operator_names() -> dict[int, str]:
    """Returns the name of every built-in operator by its code."""
    return {code: name for name, code in vars(schema().BuiltinOperator).items() if name[0] != "_"}


def converted(text: str, signature: str, inputs: list[str], outputs: list[str]) -> Any:
    """Returns the graph of a StableHLO program as a `ModelT` with one signature.

    Raises: InputError where the extra is not installed, or an operation has no form in LiteRT.
    """
    classes = schema()
    try:
        from litert_converter import converter_api_ext as api
        from litert_converter.mlir import ir, passmanager
    except ImportError as error:
        raise InputError(f"LiteRT's converter is not installed ({error}): {EXTRA}") from None
    context = ir.Context()
    api.prepare_mlir_context(context)
    with context, ir.Location.unknown():
        module = ir.Module.parse(text, context)
        api.set_signature(module.operation, signature, inputs, outputs)
        passes = passmanager.PassManager(context=context)
        try:
            api.run_convert_to_tfl_passes(module, passes, api.ConvertToTFLConfig())
            made = api.export_flatbuffer_to_bytes(module.operation)
        except Exception as error:  # the bindings raise what MLIR says as several kinds
            raise InputError(
                f"LiteRT's converter refuses the {signature} graph: {one_line(error)}"
            ) from None
    model = classes.ModelT.InitFromObj(classes.Model.GetRootAsModel(made, 0))
    _refuse_foreign(model, signature)
    return model


def _refuse_foreign(model: Any, signature: str) -> None:
    """What is no built-in operator is one that the runtime of a phone does not have."""
    names = operator_names()
    for code in model.operatorCodes:
        name = names.get(code_of(code), "?")
        if name == "CUSTOM" or name.startswith("STABLEHLO_"):
            what = code.customCode.decode() if code.customCode else name
            raise InputError(f"the {signature} graph needs {what}, which LiteRT's runtime lacks")


def code_of(code: Any) -> int:
    """Returns the number of an operator: older ones stand in another field."""
    return max(code.builtinCode, code.deprecatedBuiltinCode)
