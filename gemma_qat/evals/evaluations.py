"""Files of `gemma-qat evaluate` in the report: checked, put together where they compare, and what follows from them.

An evaluation is {"kind": "evaluation", "text", "reference", "models", "differences", "environment"}:

    text         {"documents", "tokens", "length", "format", "digest", "categories", "warnings"}
    reference    {"name", "bytes", "summary", ...}
    models       {NAME: {"recipe", "method" (optional: "qat", "rtn"), "size", "bytes", "float_bytes", "summary",
                         "own" (optional: "name", "summary"),
                         "categories": {CATEGORY: {STAT: estimate}}, "positions": [{"from", "to", STAT: estimate}],
                         "kl_histogram": {"edges", "counts"}}}
    differences  {"A-B": {STAT: estimate with "excludes_zero"}}
    tasks        (optional) {"lm_eval": version, "tasks": {TASK: {"shots"}}, "models": {NAME: {TASK: {"metrics"}}}}
    recovered    (optional) {A: {B: {STAT: estimate in percent}}}: of what B lost, the share that A did not lose
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_qat.errors import InputError
from gemma_qat.evals.plots import method_in

KIND = "evaluation"
PTQ = ("rtn", "mse")


def checked(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns an evaluation whose parts are what the report reads.

    Raises: InputError, naming the file `where` and the part, for anything else.
    """
    if found.get("kind") != KIND:
        raise InputError(
            f"{where}: no evaluation: its kind is {found.get('kind')!r}, {KIND!r} expected"
        )
    for part in ("text", "reference", "models"):
        _mapping(found.get(part), where, part)
    for key in ("documents", "tokens", "length"):
        _number(found["text"].get(key, 0), where, f"text/{key}")
    if not isinstance(found["text"].get("warnings", []), list):
        raise InputError(
            f"{where}: text/warnings is {_kind(found['text']['warnings'])}, a list expected"
        )
    _summary(found["reference"].get("summary"), where, "reference")
    for name, model in found["models"].items():
        _model(model, where, f"models/{name}")
    for name, difference in _mapping(found.get("differences", {}), where, "differences").items():
        _summary(difference, where, f"differences/{name}")
    for name, results in _mapping(_tasks(found, where).get("models", {}), where, "tasks").items():
        for task, result in _mapping(results, where, f"tasks/models/{name}").items():
            _mapping(result.get("metrics"), where, f"tasks/models/{name}/{task}/metrics")
    for name, won in _mapping(found.get("recovered", {}), where, "recovered").items():
        for versus, share in _mapping(won, where, f"recovered/{name}").items():
            _mapping(share, where, f"recovered/{name}/{versus}")
    return dict(found)


def _tasks(found: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    return _mapping(found.get("tasks", {}), where, "tasks")


def together(found: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Returns one evaluation for all those of the same text against the same reference, with the "files" it is from.

    `found` is (label of the file, evaluation). A name that two files have gets its file's label before it.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for label, one in found:
        text, reference = one["text"], one["reference"]
        key = (
            text.get("digest", label), text.get("length"), text.get("format"),
            reference.get("name"), _value(reference["summary"].get("nll")),
        )  # fmt: skip
        if key not in groups:
            groups[key] = {**one, "files": [label]}
            groups[key]["models"] = dict(one["models"])
            groups[key]["differences"] = dict(one.get("differences", {}))
            groups[key]["recovered"] = dict(one.get("recovered", {}))
            continue
        _add(groups[key], label, one)
    return list(groups.values())


def recovered(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns {A: {B: {"loss_gap", "kl_mean": estimate in percent}}}: of what B lost, the share A did not lose.

    A was trained and B was not, both of one size and recipe, by the methods their names or files tell. Where the file
    holds no such estimate the value is 100 * (1 - a / b), without an interval, since a file holds no draws to make it
    from.
    """
    models, kept = evaluation["models"], evaluation.get("recovered", {})
    out: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        if method_of(name, model) not in ("qat", "qat_ce"):
            continue
        for other, versus in models.items():
            same = all(model.get(key) == versus.get(key) for key in ("recipe", "size"))
            if method_of(other, versus) in PTQ and same:
                measured = kept.get(name, {}).get(other)
                won = measured or _recovered(model["summary"], versus["summary"])
                if won:
                    out.setdefault(name, {})[other] = won
    return out


def method_of(name: str, model: Mapping[str, Any]) -> str | None:
    """Returns how a model was made: as its name tells, else as its file does."""
    return method_in(name) or model.get("method") or None


def _recovered(ours: Mapping[str, Any], ptq: Mapping[str, Any]) -> dict[str, Any]:
    won: dict[str, Any] = {}
    for key, words in (("loss_gap", "loss gap"), ("kl_mean", "mean KL")):
        if key not in ours or key not in ptq:
            continue
        lost = ptq[key]
        low = lost.get("low", lost["value"]) if isinstance(lost, Mapping) else lost
        if low is None or low <= 0 or _value(lost) <= 0:
            reason = f"the {words} without training is not clearly above zero"
            won[key] = {"value": None, "low": None, "high": None, "reason": reason}
        else:
            won[key] = {"value": 100 * (1 - _value(ours[key]) / _value(lost))}
    return won


def _add(group: dict[str, Any], label: str, one: Mapping[str, Any]) -> None:
    renamed = {
        name: f"{label} {name}" if name in group["models"] else name for name in one["models"]
    }
    group["files"].append(label)
    group["models"] |= {renamed[name]: model for name, model in one["models"].items()}
    for first in one["models"]:
        for second in one["models"]:
            difference = one.get("differences", {}).get(f"{first}-{second}")
            if difference is not None:
                group["differences"][f"{renamed[first]}-{renamed[second]}"] = difference
    if "tasks" in one:
        known = group.get("tasks", {"tasks": {}, "models": {}})
        models = dict(known["models"])
        for name, results in one["tasks"]["models"].items():
            # The reference stands in both files, maybe with other tasks.
            now = renamed.get(name, name)
            models[now] = models.get(now, {}) | results
        about = known.get("tasks", {}) | one["tasks"].get("tasks", {})
        group["tasks"] = one["tasks"] | known | {"tasks": about, "models": models}
    for first, won in one.get("recovered", {}).items():
        group["recovered"][renamed.get(first, first)] = {
            renamed.get(second, second): share for second, share in won.items()
        }


def _value(estimate: Any) -> Any:
    return estimate.get("value") if isinstance(estimate, Mapping) else estimate


def _model(model: Any, where: str, place: str) -> None:
    _mapping(model, where, place)
    _summary(model.get("summary"), where, place)
    for key in ("bytes", "float_bytes"):
        _number(model.get(key, 0), where, f"{place}/{key}")
    if "own" in model:
        _summary(
            _mapping(model["own"], where, f"{place}/own").get("summary"), where, f"{place}/own"
        )
    for name, row in _mapping(model.get("categories", {}), where, f"{place}/categories").items():
        _summary(row, where, f"{place}/categories/{name}")
    rows = model.get("positions", [])
    if not isinstance(rows, list):
        raise InputError(f"{where}: {place}/positions is {_kind(rows)}, a list expected")
    for number, row in enumerate(rows):
        _summary(row, where, f"{place}/positions/{number}")
        for end in ("from", "to"):
            _number(row.get(end), where, f"{place}/positions/{number}/{end}")
    if "kl_histogram" in model:
        counts(model["kl_histogram"], "edges", 1, f"{where}: {place}/kl_histogram")


def counts(found: Any, axis: str, more: int, place: str) -> None:
    """Refuses what is not {axis: numbers, "counts": numbers} with `more` numbers in `axis` than counts.

    Raises: InputError, naming `place`.
    """
    lists: list[Any] = [
        found.get(key) if isinstance(found, Mapping) else None for key in (axis, "counts")
    ]
    good = all(isinstance(one, list) and all(map(_is_number, one)) for one in lists)
    if not good or not lists[1] or len(lists[0]) != len(lists[1]) + more:
        raise InputError(f"{place}: no histogram of {axis!r} and 'counts'")


def _summary(found: Any, where: str, place: str) -> None:
    """Refuses a summary with a statistic that is neither a number nor an estimate."""
    for key, value in _mapping(found, where, place).items():
        if isinstance(value, Mapping):
            _number(value.get("value"), where, f"{place}/{key}/value")
            for end in ("low", "high"):
                if value.get(end) is not None:
                    _number(value[end], where, f"{place}/{key}/{end}")
        elif not isinstance(value, str):
            _number(value, where, f"{place}/{key}")


def _mapping(found: Any, where: str, place: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise InputError(f"{where}: {place} is {_kind(found)}, an object expected")
    return found


def _number(found: Any, where: str, place: str) -> None:
    if not _is_number(found):
        raise InputError(f"{where}: {place} is {_kind(found)}, a number expected")


def _is_number(found: Any) -> bool:
    return isinstance(found, int | float)


def _kind(found: Any) -> str:
    return "missing" if found is None else f"of type {type(found).__name__}"
