"""llama.cpp's `llama-perplexity --kl-divergence` beside our own records, on the same twin and the same tokens.

    cmake -B BUILD -S llama_cpp_python-0.3.36 -DLLAMA_BUILD_TOOLS=ON        (the unpacked source of llama-cpp-python)
    cmake --build BUILD -j2 --target llama-perplexity
    GEMMA_QAT_LLAMA_PERPLEXITY=BUILD/bin/llama-perplexity bash launch/test.sh -n 0 -s -m judges tests/judges/test_llama_kl.py

llama.cpp cuts a text into chunks of n_ctx tokens, puts bos in place of the first of each, and scores what the second half
predicts. The reference's log probabilities go through a file of 16 bits a word: from the largest logit down to 16 below
it, in 65535 steps, so each is off by up to STEP / 2. Both files are float32 (masters, and the weights that Q4_0 codes
stand for): with codes in the file llama.cpp would round activations too.

Its percentiles interpolate linearly between order statistics (as numpy's do) in float32, its median is the mean of the
middle two, and its errors are over tokens as if they were independent: deviation / sqrt(n - 1), by the delta method
behind exp and sqrt. Our intervals are drawn by document and are wider.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from judge_twins import UNSEEN, Twin, as_floats, dequantized, trained

from gemma_qat.data.packing import Rows
from gemma_qat.data.token_bytes import token_bytes
from gemma_qat.evals import Resamples, TokenRecords, summarize
from gemma_qat.evals.score import score
from gemma_qat.export import export_gguf
from gemma_qat.models import Gemma4

PROGRAM = os.environ.get("GEMMA_QAT_LLAMA_PERPLEXITY") or shutil.which("llama-perplexity")

pytestmark = [
    pytest.mark.judges,
    pytest.mark.skipif(
        PROGRAM is None,
        reason="needs llama.cpp's llama-perplexity: on PATH, or named by GEMMA_QAT_LLAMA_PERPLEXITY",
    ),
]

CHUNK = 128
STEP = 16 / 65535
"""Of the stored log probabilities, nats, at most."""


@pytest.fixture(scope="module", params=["e2b"])
def twin(request, tmp_path_factory) -> Twin:
    return trained(
        request.param, tmp_path_factory.mktemp(request.param), tmp_path_factory.mktemp("data")
    )


def run(twin: Twin, name: str, *more: str) -> str:
    """What llama-perplexity says of one of the twin's files."""
    given = {
        "-m": twin.directory / f"{name}.gguf", "-c": CHUNK, "-b": CHUNK, "-ub": CHUNK, "-t": 2, "-ngl": 0,
        "-ctk": "f32", "-ctv": "f32", "-fa": "off", "-fit": "off",
        "--kl-divergence-base": twin.directory / "base.kld",
    }  # fmt: skip
    options = [str(part) for pair in given.items() for part in pair]
    done = subprocess.run(
        [str(PROGRAM), *options, "--no-warmup", *more],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def whole_table(twin: Twin) -> dict[str, tuple[float, float | None]]:
    """The table of the quantized file, asked for again when it is cut off.

    What llama.cpp says goes through a thread that is not waited for when the program ends (`common_log_main` in its
    common/log.cpp says so): on a busy machine the last lines are lost now and then.
    """
    for _ in range(5):
        said = run(twin, "q", "--kl-divergence")
        if "Same top p:" in said:
            return table(said)
    raise AssertionError(f"llama-perplexity ended five times without its table: {said[-500:]}")


def table(said: str) -> dict[str, tuple[float, float | None]]:
    """The lines `name : value ± error` of its three tables; shares as shares, not percent."""
    number = r"(-?\d+\.\d+)"
    line = re.compile(rf"^([^:\n]+?)\s*:\s*{number}\s*(?:±\s*{number})?\s*(%?)\s*$", re.MULTILINE)
    found = {}
    for name, value, error, percent in line.findall(said[said.index("====== Perplexity") :]):
        unit = 0.01 if percent else 1.0
        name = re.sub(r"\s+", " ", name.strip())
        found[name] = (float(value) * unit, float(error) * unit if error else None)
    return found


def stored(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [chunks, CHUNK] and log probabilities float32 [chunks, predicted, V] of llama.cpp's file."""
    raw = file.read_bytes()
    assert raw[:8] == b"_logits_"
    length, vocab, chunks = np.frombuffer(raw, np.int32, 3, 8)
    tokens = np.frombuffer(raw, np.int32, chunks * length, 20).reshape(chunks, length)
    words = 2 * ((vocab + 1) // 2) + 4
    rows = np.frombuffer(raw, np.uint16, offset=20 + tokens.nbytes).reshape(chunks, -1, words)
    scale, least = np.ascontiguousarray(rows[..., :4]).view(np.float32).transpose(2, 0, 1)
    return tokens, scale[..., None] * rows[..., 4 : 4 + vocab] + least[..., None]


def rows_of(tokens: np.ndarray, bos: int) -> Rows:
    """llama.cpp's chunks as rows: bos first, what the second half predicts to be scored, a document a chunk."""
    tokens = tokens.copy()
    tokens[:, 0] = bos
    column = np.broadcast_to(np.arange(CHUNK, dtype=np.int32), tokens.shape)
    return Rows(
        tokens=tokens, segments=np.ones_like(tokens), positions=column.copy(),
        documents=np.broadcast_to(np.arange(len(tokens), dtype=np.int32)[:, None], tokens.shape).copy(),
        learn=(column > CHUNK // 2).astype(np.int32),
    )  # fmt: skip


SUMMARY = {
    "perplexity": "Mean PPL(Q)", "perplexity_ratio": "Mean PPL(Q)/PPL(base)", "kl_mean": "Mean KLD",
    "kl_max": "Maximum KLD", "mean_shift": "Mean \u0394p", "rms_shift": "RMS \u0394p",
    "top1_agreement": "Same top p", "loss_gap": "Mean ln(PPL(Q)/PPL(base))",
}  # fmt: skip
"""What our summaries call what its table has. Percentiles are one of the values there, between two in llama.cpp."""


def by_tokens(records: TokenRecords) -> dict[str, tuple[float, float | None]]:
    """What llama.cpp's table holds, from our records, by its definitions."""

    def mean(x: np.ndarray) -> tuple[float, float]:
        return float(x.mean()), float(x.std() / (len(x) - 1) ** 0.5)

    def through_exp(x: np.ndarray) -> tuple[float, float]:
        value, error = mean(x)
        return float(np.exp(value)), float(np.exp(value) * error)

    shift = np.exp(-records.nll) - np.exp(-records.reference_nll)
    square, square_error = mean(shift**2)
    top, _ = mean(records.agree)
    kl = {
        f"{100 * p:.1f}% KLD": (float(np.quantile(records.kl, p)), None) for p in (0.9, 0.99, 0.999)
    }
    return kl | {
        "Mean PPL(Q)": through_exp(records.nll),
        "Mean PPL(base)": through_exp(records.reference_nll),
        "Mean ln(PPL(Q)/PPL(base))": mean(records.nll - records.reference_nll),
        "Mean PPL(Q)/PPL(base)": through_exp(records.nll - records.reference_nll),
        "Mean KLD": mean(records.kl),
        "Median KLD": (float(np.median(records.kl)), None),
        "Maximum KLD": (float(records.kl.max()), None),
        "Mean Δp": mean(shift),
        "RMS Δp": (square**0.5, 0.5 / square**0.5 * square_error),
        "Same top p": (top, (top * (1 - top) / (records.tokens - 1)) ** 0.5),
    }


def test_the_table_of_llama_perplexity(twin: Twin) -> None:
    """If it fails, the KL that we print is not the KL that the field quotes."""
    for name, floats in (("base", twin.masters), ("q", dequantized(twin))):
        export_gguf(as_floats(twin, floats), twin.directory / f"{name}.gguf")
    run(twin, "base", "-f", str(UNSEEN))
    theirs = whole_table(twin)
    tokens, log_p = stored(twin.directory / "base.kld")
    ids = twin.tokenizer.encode(UNSEEN.read_text(), bos=True)
    np.testing.assert_array_equal(tokens.ravel(), ids[: tokens.size])
    models = [
        Gemma4.from_parameters(twin.artifact.config, x) for x in (twin.masters, dequantized(twin))
    ]
    rows = rows_of(tokens, twin.tokenizer.bos_id)
    _, scored = score({"q": models[1]}, models[0], rows, token_bytes(twin.tokenizer))
    records = scored["q"]
    half = CHUNK // 2
    assert records.tokens == len(tokens) * (half - 1)
    picked = np.take_along_axis(log_p, tokens[:, half + 1 :, None], axis=-1).ravel()
    off = np.abs(-picked - records.reference_nll)
    print(
        f"\n{twin.artifact.config.name}: {records.tokens} tokens, base nll off by at most {off.max():.2g}"
    )
    ours = by_tokens(records)
    print(f"{'':26}{'llama.cpp':>24}{'ours':>24}{'difference':>12}")
    for name, (value, error) in ours.items():
        value_of_theirs, error_of_theirs = theirs[name]
        columns = [value_of_theirs, error_of_theirs or 0.0, value, error or 0.0]
        print(
            f"{name:26}" + "".join(f"{x:12.6f}" for x in columns),
            f"{value - value_of_theirs:11.1e}",
        )
    for name, (value, error) in ours.items():
        value_of_theirs, error_of_theirs = theirs[name]
        room = allowed(name, value, records.tokens)
        assert abs(value - value_of_theirs) < room, name
        assert (error is None) == (error_of_theirs is None), name
        if error is not None and error_of_theirs is not None:
            assert abs(error - error_of_theirs) < room, name
    summary = summarize(records, Resamples(records.documents, seed=0, draws=10))
    for key, name in SUMMARY.items():
        assert summary[key]["value"] == pytest.approx(ours[name][0], rel=1e-9, abs=1e-12), name


def allowed(name: str, value: float, n: int) -> float:
    """How far apart one of the figures may be.

    A token's stored log probability is off by up to STEP / 2, and llama.cpp's float16 GELU moves it about as much: STEP
    for what one token's KL is (percentiles, the largest), four deviations of a mean of n such errors for means.
    Perplexities are exp of a mean. Shares are printed in percent with three decimals. Of two equal tops after rounding
    llama.cpp takes the first: two tokens of n.
    """
    mean, printed = 4 * STEP / n**0.5, 5e-6 if "p" in name.split()[-1] else 5e-7
    if name == "Same top p":
        return 2 / n + printed
    if "PPL" in name and "ln" not in name:
        return value * mean
    return printed + (STEP if "KLD" in name and not name.startswith("Mean") else mean)
