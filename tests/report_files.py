"""Small files in the shapes that training, evaluation, export and benchmarks leave: what a report is gathered from."""

import json

NASTY = "<b>&"


def estimate(value, spread=0.1):
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread)}


def summary(kl):
    shares = {"top1_agreement": 1 - kl, "rms_shift": kl / 3, "mean_shift": kl / 100}
    values = {
        "nll": 2 + kl, "bits_per_byte": 1 + kl, "perplexity": 7.4 + kl, "perplexity_ratio": 1 + kl,
        "loss_gap": kl, "kl_mean": kl, "kl_median": kl / 2, "kl_p90": 2 * kl, "kl_p99": 4 * kl,
        "kl_p999": 9 * kl, **shares,
    }  # fmt: skip
    found = {name: estimate(value) for name, value in values.items()}
    return {**found, "kl_max": {"value": 50 * kl}, "tokens": 700, "documents": 7, "draws": 100, "level": 0.95}  # fmt: skip


def model(recipe, size, kl):
    return {
        "path": "somewhere", "size": "tiny_e2b", "recipe": recipe, "bytes": size, "float_bytes": 4000,
        "summary": summary(kl),
        "categories": {
            "code": {"tokens": 300, "documents": 3, "kl_mean": estimate(kl)},
            "prose": {"tokens": 400, "documents": 4, "kl_mean": estimate(2 * kl), "nll": 2.5},
        },
        "positions": [
            {"from": 0, "to": 64, "tokens": 350, "nll": 2.1, "kl_mean": estimate(kl), "top1_agreement": estimate(0.9)},
            {"from": 64, "to": 128, "tokens": 350, "nll": 2.0, "kl_mean": estimate(kl), "top1_agreement": estimate(0.8)},
        ],
        "kl_histogram": {"edges": [0.001, 0.1, 10.0], "counts": [5, 2]},
    }  # fmt: skip


def evaluation(models=None, digest="abc"):
    models = models or {"w4-rtn": model("w4", 1000, 0.4), "w4-qat": model("w4", 1000, 0.1)}
    first, *others = models
    return {
        "kind": "evaluation",
        "text": {"documents": 7, "tokens": 700, "length": 128, "format": "text", "digest": digest,
                 "categories": {"code": 3, "prose": 4}, "warnings": ["raw <text>"]},
        "reference": {"name": "the-float", "path": "f", "size": "tiny_e2b", "recipe": "float", "bytes": 4000,
                      "summary": summary(0.0)},
        "models": models,
        "differences": {f"{first}-{other}": {"kl_mean": {**estimate(0.3), "excludes_zero": True}} for other in others},
        "environment": {"jax": "0"},
    }  # fmt: skip


def bench():
    return {
        "environment": {"device": "1 x cpu"}, "copy_bandwidth": 8e9,
        "speeds": [{"kind": "product", "format": "q4_0", "rows": 1, "bytes": 4096, "share": 0.5}],
        "whole": [{"size": "tiny_e2b", "weights": "q4_0", "cache": "float", "batch": 1, "weight_bytes": 1000,
                   "seconds": None, "tokens_per_second": None, "note": "too large"},
                  {"size": "tiny_e2b", "weights": "float32", "cache": "int8", "batch": 1, "weight_bytes": 4000,
                   "seconds": 0.001, "tokens_per_second": 1000.0, "bytes_per_token": 4000.0, "roofline_share": 0.9,
                   "speedup": 1.0}],
        "costs": [{"name": "float", "seconds": 0.01, "time_ratio": 1.0, "bytes": 10, "memory_ratio": 1.0}],
    }  # fmt: skip


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def run_folder(folder, *, steps=100, experts=False):
    """A run's folder with everything in it."""
    settings = {
        "name": folder.name, "model": "tiny_e2b", "recipe": NASTY,
        "train": {"loss": "kl", "steps": steps, "seed": 0}, "data": {"length": 128},
    }  # fmt: skip
    write(folder / "config.json", settings)
    write(folder / "run.json", {"versions": {"jax": "0.10.2"}, "data": {"digest": "d" * 64}})
    rows = [
        {"site": f"layers/{layer}/attn/q/kernel", "role": "attn_q", "shape": [8, 100], "format": "q4_0",
         "bits": 4.5, "bytes": 450.0, "share": 0.4, "activations": ""}
        for layer in range(2)
    ]  # fmt: skip
    rows.append({"site": "embed/table", "role": "embed", "format": "float16", "bits": 16.0, "bytes": 200.0, "share": 0.2})  # fmt: skip
    write(folder / "coverage.json", {"rows": rows})
    lines = [
        {"step": step, "loss": 2.0 / step, "kl": 1.0 / step, "nll": 3.0, "tokens_per_second": 9.5}
        for step in range(1, 5)
    ]
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    sites = {
        f"layers/{layer}/attn/q/kernel": {"format": "q4_0", "layer": layer, "relative_error": 0.07, "clipped": 0.01}
        for layer in range(2)
    }  # fmt: skip
    use = {"q4_0": {"codes": list(range(-8, 8)), "counts": list(range(16))}}
    load = {"layers/0": [3, 1, 2]} if experts else {}
    write(folder / "codes.json", {"sites": sites, "code_use": use, "expert_load": load})
    write(folder / "export.json", {"format": "gguf", "differing_codes": 0, "differing_scales": 3})
    return folder
