"""Writes a checkpoint for other programs from its stored codes, read back and compared before it appears."""

from __future__ import annotations

import argparse
from typing import Any

from gemma_qat.cli.console import add_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("source", help="a checkpoint, or a run directory")
    parser.add_argument(
        "--format", required=True,
        help="gguf, litert, native, compressed-tensors, mobile or huggingface (float safetensors)",
    )  # fmt: skip
    parser.add_argument(
        "--out", required=True, help="file (gguf; litert: .tflite, or .litertlm with tokenizer) or directory to write",
    )  # fmt: skip
    parser.add_argument(
        "--recipe", default=None, help="refuse the checkpoint if its recipe is another one"
    )
    add_tokenizer(parser)
    _hub_arguments(parser)
    parser.add_argument(
        "--prefill", type=int, default=None, metavar="TOKENS", help="litert: read in one call (128)"
    )
    parser.add_argument(
        "--cache",
        type=int,
        default=None,
        metavar="SLOTS",
        help="litert: tokens a cache holds (1280)",
    )
    parser.add_argument(
        "--verify", action="store_true",
        help="then read it once more and print what differs from the checkpoint, bytes, bits per weight",
    )  # fmt: skip
    parser.add_argument(
        "--json", metavar="FILE", help="write what --verify found, such as RUN/export.json for the report",
    )  # fmt: skip
    parser.add_argument(
        "--only-verify", action="store_true", help="the same of what is at --out; write nothing"
    )
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE",
        help="with --verify: KL and top-1 against the fake-quantized model on these files (at least two)",
    )  # fmt: skip


def _hub_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", default="float32", help="of float arrays in hub formats: float32 or bfloat16"
    )
    parser.add_argument(
        "--tables",
        default="float",
        help="quantized tables in compressed-tensors: float (values of their codes) or packed",
    )
    parser.add_argument(
        "--masters", action="store_true", help="float masters instead of the codes made of them"
    )
    parser.add_argument(
        "--files", default=None, metavar="DIR",
        help="a directory whose tokenizer, chat template and generation config go along",
    )  # fmt: skip
    parser.add_argument(
        "--carry", action=argparse.BooleanOptionalAction, default=True,
        help="huggingface: with the towers (vision, audio) that came with the model, where there are any",
    )  # fmt: skip
    parser.add_argument(
        "--report", default=None, metavar="FILE", help="report.json for the figures in the card"
    )


def run(arguments: argparse.Namespace) -> int:
    """Exports and prints what was written."""
    from gemma_qat import api
    from gemma_qat.checkpoint.store import read_manifest
    from gemma_qat.cli.console import tokenizer_for, writable
    from gemma_qat.data.tokenizer import tokenizer_among
    from gemma_qat.errors import InputError
    from gemma_qat.export import HubOptions

    _refuse_other_recipe(arguments)
    if arguments.format == "litert":
        _quiet()
    verify = arguments.verify or arguments.only_verify
    for name in ("text", "json"):
        if getattr(arguments, name) and not verify:
            raise InputError(f"--{name} is about what --verify finds")
    writable(arguments.json)
    tokenizer = None
    if arguments.tokenizer or arguments.text:
        found = read_manifest(api.resolve_checkpoint(arguments.source))
        tokenizer = tokenizer_for(arguments.tokenizer, arguments.source, found.config.vocab_size)
    if not arguments.only_verify:
        hub = HubOptions(
            dtype=arguments.dtype, tables=arguments.tables, report=_report(arguments.report),
            beside=_files(arguments.files),
        )  # fmt: skip
        size = api.export(
            arguments.source, format=arguments.format, out=arguments.out, tokenizer=tokenizer,
            masters=arguments.masters, hub=hub, carry=arguments.carry, lengths=_lengths(arguments),
        )  # fmt: skip
        print(
            f"{arguments.out}: {size['tensors']} tensors, {size['bytes']:,} bytes, read back equal"
        )
        if arguments.format == "gguf" and tokenizer is None:
            files = api.companions_of(arguments.source).files
            if tokenizer_among(files) is None:
                print(
                    "no tokenizer lies beside it: the file takes token ids only (--tokenizer FILE)"
                )
        rounded = size.get("rounded_scales", 0)
        if rounded:
            print(f"{rounded:,} scales were no float16 and were rounded to one, codes are exact")
        towers = api.companions_of(arguments.source).towers
        if towers and arguments.format != "huggingface":
            kinds = ", ".join(sorted(set(towers.left.values()), reverse=True))
            print(
                f"left out: {len(towers.left)} tensors ({kinds}); --format huggingface writes them"
            )
    return _verify(arguments, tokenizer) if verify else 0


def _quiet() -> None:
    """Keeps LiteRT's converter from telling about itself on stderr, where nobody has said otherwise."""
    import os

    for name, value in (("TF_CPP_MIN_LOG_LEVEL", "3"), ("TF_ENABLE_ONEDNN_OPTS", "0")):
        os.environ.setdefault(name, value)


def _lengths(arguments: argparse.Namespace) -> Any:
    from gemma_qat.export import Lengths

    given = {"prefill": arguments.prefill, "cache": arguments.cache}
    return Lengths(**{name: value for name, value in given.items() if value is not None})


def _files(directory: str | None) -> Any:
    from pathlib import Path

    from gemma_qat.checkpoint.beside import beside
    from gemma_qat.errors import InputError

    if directory is None:
        return ()
    if not Path(directory).is_dir():
        raise InputError(f"{directory}: no such directory to take files from")
    found = beside(Path(directory))
    if not found:
        raise InputError(
            f"{directory}: no tokenizer, chat template, generation config or config.json in it"
        )
    return found


def _refuse_other_recipe(arguments: argparse.Namespace) -> None:
    from gemma_qat import api
    from gemma_qat.checkpoint.store import read_manifest
    from gemma_qat.errors import InputError
    from gemma_qat.quant import name_of

    if arguments.recipe is None:
        return
    found = read_manifest(api.resolve_checkpoint(arguments.source))
    if found.recipe != name_of(arguments.recipe, found.config.family):
        raise InputError(
            f"{arguments.source}: recipe {arguments.recipe} asked for, the checkpoint is {found.recipe or 'float'}"
        )


def _report(path: str | None) -> dict[str, Any] | None:
    import json
    from pathlib import Path

    from gemma_qat.errors import InputError

    if path is None:
        return None
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        found["recipes"]  # what a card is made of
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a report.json ({error})") from None
    return found


def _verify(arguments: argparse.Namespace, tokenizer: Any) -> int:
    from pathlib import Path

    from gemma_qat import api
    from gemma_qat.checkpoint.store import write_json
    from gemma_qat.cli.console import progress

    with progress() as report:
        found = api.verify_export(
            arguments.source, format=arguments.format, out=arguments.out, text=arguments.text,
            tokenizer=tokenizer, masters=arguments.masters, progress=report,
        )  # fmt: skip
    if arguments.json:
        write_json(Path(arguments.json), {"format": arguments.format, **found})
    names = ("differing_codes", "differing_scales", "differing_floats")
    print(", ".join(f"{name.replace('_', ' ')} {found[name]}" for name in names))
    print(f"{found['bytes']:,} bytes, {found['bits_per_weight']:.3f} bits per weight")
    if "changed" in found:
        print(
            f"a quantizer that derives scales from the values in the file changes {found['changed']:,} of "
            f"{found['codes']:,} codes"
        )
    if "summary" in found:
        kl, top = found["summary"]["kl_mean"], found["summary"]["top1_agreement"]
        print(
            f"against the fake-quantized model: KL {kl['value']:.3g} [{kl['low']:.3g}, {kl['high']:.3g}], "
            f"top-1 agreement {top['value']:.2%} [{top['low']:.2%}, {top['high']:.2%}]"
        )
    if found["changed_files"]:
        print(
            f"{found['changed_files']} files changed since they were written (SHA-256 in gemma_qat.json)"
        )
    differ = any(found[name] for name in (*names, "changed_files"))
    return 1 if differ else 0
