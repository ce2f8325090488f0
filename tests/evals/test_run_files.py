"""Gathering: every file of a run is read, what is broken is named, what compares is put side by side."""

import html.parser
import json
import re

import pytest
from report_files import NASTY, bench, estimate, evaluation, model, run_folder, write

from gemma_qat.errors import InputError
from gemma_qat.evals import evaluations, gather, headline, html_page, run_files
from gemma_qat.evals.figures import figures_of
from gemma_qat.evals.run_files import labels_of


@pytest.fixture
def run(tmp_path):
    return run_folder(tmp_path / "one")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Data of two runs, an evaluation, a benchmark; and the page they make."""
    root = tmp_path_factory.mktemp("runs")
    runs = [run_folder(root / "one"), run_folder(root / "two", steps=200, experts=True)]
    found = write(root / "evaluation.json", evaluation())
    speed = write(root / "speed.json", bench())
    data = gather(runs, [found], [speed])
    return data, html_page(data)


def test_every_file_has_its_section(everything):
    """If this fails, something that a run left is not in the report."""
    data, page = everything
    assert list(data["runs"]) == ["one", "two"]
    assert set(data["runs"]["one"]) == {
        "config", "about", "coverage", "bytes", "float_bytes", "curves", "codes", "exports",
    }  # fmt: skip
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Quality", "What was trained", "Training", "Inside the grid", "What is stored, and how",
        "Speed", "Export, read back and compared",
    ]  # fmt: skip
    names = {figure.name for figure in figures_of(data)}
    assert names == {
        "quality_against_bytes", "kl_histogram", "kl_mean_by_position", "top1_agreement_by_position",
        "kl_by_category", "loss", "kl", "nll", "tokens_per_second", "relative_error_by_layer-one",
        "relative_error_by_layer-two", "clipped_by_layer-one", "clipped_by_layer-two",
        "expert_load-two", "code_use", "bits_per_site-one", "bits_per_site-two", "roofline-speed",
    }  # fmt: skip


def test_the_page_is_whole_and_loads_nothing(everything):
    """If this fails, names from files are run as markup, tags do not close, or the page fetches something."""
    _, page = everything
    assert "http" not in page and NASTY not in page and "raw &lt;text&gt;" in page
    assert not re.search(r"\b(src|href)=\"[^#]", page)
    opened = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            opened.extend([tag] if tag not in ("meta", "path", "use", "wbr") else [])

        def handle_endtag(self, tag):
            assert tag in ("path", "use") or opened.pop() == tag

    Reader().feed(page)
    assert opened == []
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_settings_that_differ_are_marked_and_others_folded(everything):
    """If this fails, a reader does not see what two runs did differently."""
    _, page = everything
    marked = re.findall(r'<tr class="ours"><th>(?:train\.<wbr>)?(\w+)</th>', page)
    assert marked == ["steps"]
    assert "1 more, the same in all" in page  # train.seed


def test_what_should_be_none_is_judged(everything):
    """If this fails, an export with other scales than were trained looks as good as one without."""
    _, page = everything
    assert '<span class="bad">3</span>' in page and '<span class="good">0</span>' in page


def test_figures_of_a_summary_are_in_the_tables(everything):
    """If this fails, a statistic is measured and not shown."""
    _, page = everything
    for words in (
        "0.100",
        "90.00%",
        "perplexity ratio",
        "99.9% KL",
        "largest KL",
        "RMS shift of p",
    ):
        assert words in page
    assert "75.0%<small>of w4-rtn" in page  # recovered: 1 - 0.1 / 0.4
    assert "w4-<wbr>rtn − w4-<wbr>qat" in page


def test_bytes_and_bits_are_added_up(run):
    """If this fails, coverage of classes is not that of their arrays."""
    found = gather([run])["runs"]["one"]
    assert [(row["site"], row["count"], row["bytes"], row["bits"]) for row in found["coverage"]] == [
        ("attn_q", 2, 900.0, 4.5), ("embed", 1, 200.0, 16.0),
    ]  # fmt: skip
    assert found["bytes"] == 1100 and found["float_bytes"] == 2 * (1600 + 100)
    assert sum(row["share"] for row in found["coverage"]) == pytest.approx(1)


def test_the_older_table_of_coverage_is_read(run):
    """If this fails, runs from before coverage.json lose their coverage."""
    (run / "coverage.json").unlink()
    write(
        run / "coverage.txt",
        "embed/table            int2    2.250 bits          36,864 B   4.44%\n"
        "layers/0/attn/q/kernel int4    4.250 bits           8,704 B   1.05%  in int8 static, out int8 static\n"
        "layers/1/attn/q/kernel int4    4.250 bits           8,704 B   1.05%  in int8 static, out int8 static\n",
    )
    rows = gather([run])["runs"]["one"]["coverage"]
    assert [(row["site"], row["bytes"], row["count"]) for row in rows] == [
        ("embed", 36864.0, 1), ("attn/q", 17408.0, 2),
    ]  # fmt: skip
    assert rows[1]["activations"] == "in int8 static, out int8 static"


@pytest.mark.parametrize(
    "name", ["run.json", "coverage.json", "metrics.jsonl", "codes.json", "export.json"]
)
def test_any_file_but_the_config_may_be_missing(run, name):
    """If this fails, a run that was stopped early, or never exported, has no report."""
    (run / name).unlink()
    data = gather([run])
    assert "one" in data["title"] and data["runs"]["one"]["config"]["model"] == "tiny_e2b"


def test_curves_are_thinned_and_end_where_the_run_does(run, monkeypatch):
    """If this fails, a long run makes a page that no browser opens, or its last step is lost."""
    monkeypatch.setattr(run_files, "MOST", 4)
    lines = (json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 10))
    write(run / "metrics.jsonl", "".join(lines))
    found = gather([run])["runs"]["one"]
    assert found["curves_every"] == 3
    assert [step for step, _ in found["curves"]["loss"]] == [3, 6, 9]


def test_a_line_that_is_being_written_is_left_out(run):
    """If this fails, a run that still trains has no report, or half a number is in it."""
    whole = (run / "metrics.jsonl").read_text()
    write(run / "metrics.jsonl", whole + '{"step": 5, "los')
    assert gather([run])["runs"]["one"]["curves"]["loss"][-1][0] == 4


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{", "config.json: not JSON"),
        ("config.json", "[]", "config.json: a JSON object expected, not a list"),
        ("config.json", {"architectures": []}, "config.json: not the config of a run"),
        ("run.json", '{"a": NaN}', "run.json: NaN is no number that JSON has"),
        ("run.json", '{"a": 1e999}', "run.json: 1e999 is no number that JSON has"),
        ("coverage.json", {"rows": [{"site": "a"}]}, "coverage.json: row 0 has no site, format"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "metrics.jsonl: line 2: not JSON"),
        ("metrics.jsonl", '{"loss": 1}\n', "metrics.jsonl: line 1 has no step"),
        ("codes.json", {"sites": []}, "codes.json: 'sites' is no object"),
        ("codes.json", {"code_use": {"q4_0": {"codes": [1], "counts": []}}}, "codes.json: code_use/q4_0: no hist"),
        ("export.json", "x", "export.json: not JSON"),
        ("bench.json", {}, "bench.json: not what 'gemma-qat bench --json' writes"),
        ("bench.json", {"whole": [{}]}, "bench.json: whole/0 has not all of batch, cache"),
        ("evaluation.json", {"kind": "evaluation"}, "evaluation.json: text is missing, an object expected"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named(run, name, content, words):
    """If this fails, a broken file is dropped without a word, or nobody knows which of them it is."""
    write(run / name, content)
    with pytest.raises(InputError, match=re.escape(words)) as error:
        gather([run])
    assert str(run / name) in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.update(kind="sensitivity"), "no evaluation: its kind is 'sensitivity'"),
        (lambda e: e["reference"].pop("summary"), "reference is missing"),
        (lambda e: e["text"].update(tokens="many"), "text/tokens is of type str"),
        (lambda e: e["text"].update(warnings=5), "text/warnings is of type int"),
        (lambda e: e["models"]["w4-qat"].update(summary=[1]), "models/w4-qat is of type list"),
        (lambda e: e["models"]["w4-qat"]["summary"].update(nll={}), "w4-qat/nll/value is missing, a number"),
        (lambda e: e["models"]["w4-qat"]["positions"][1].pop("to"), "positions/1/to is missing"),
        (lambda e: e["models"]["w4-qat"]["kl_histogram"]["edges"].pop(), "kl_histogram: no histogram of 'edges'"),
    ],
)  # fmt: skip
def test_a_broken_evaluation_is_named(tmp_path, change, words):
    """If this fails, a file that another version wrote ends in a traceback."""
    found = evaluation()
    change(found)
    with pytest.raises(InputError, match=re.escape(words)):
        gather([], [write(tmp_path / "e.json", found)])


def test_folders_that_are_no_runs_are_told(tmp_path):
    """If this fails, a mistyped folder makes an empty page."""
    run_folder(tmp_path / "one")
    with pytest.raises(InputError, match="no run: no config.json in it; runs in it: one"):
        gather([tmp_path])
    with pytest.raises(InputError, match="nowhere: no such directory"):
        gather([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="nothing to report on"):
        gather([])
    with pytest.raises(InputError, match="named twice"):
        gather([tmp_path / "one", tmp_path / "one"])


def test_names_are_as_short_as_they_can_be(tmp_path):
    """If this fails, two runs of one name are taken for one."""
    assert labels_of([tmp_path / "a" / "run", tmp_path / "b" / "other.json"]) == ["run", "other"]
    assert labels_of([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]


def test_evaluations_of_one_text_stand_in_one_table(tmp_path):
    """If this fails, runs that were measured alike are not compared; or those that were not, are."""
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two")
    ours = {"m-qat": model("w4", 1000, 0.1), "m-rtn": model("w4", 1000, 0.2)}
    write(one / "evaluation.json", evaluation(ours))
    write(two / "evaluation.json", evaluation({"m-rtn": model("w2", 500, 0.4)}))
    write(two / "evaluation-other.json", evaluation(digest="other"))
    write(two / "evaluation-sensitivity.json", {"kind": "sensitivity"})
    data = gather([one, two])
    # Files are read in the order of their names: other text comes first in the second folder.
    assert [list(e["models"]) for e in data["evaluations"]] == [
        ["m-qat", "m-rtn", "two m-rtn"], ["w4-rtn", "w4-qat"],
    ]  # fmt: skip
    assert list(data["evaluations"][0]["differences"]) == ["m-qat-m-rtn"]
    assert len(data["left_aside"]) == 1 and "sensitivity" in data["left_aside"][0]


def test_recovered_is_of_the_same_recipe_and_not_of_nothing():
    """If this fails, training is credited with what another recipe, or no rounding at all, cost."""
    models = {
        "a-qat": model("a", 9, 0.1), "a-mse": model("a", 9, 0.2), "b-rtn": model("b", 9, 0.8),
        "c-qat": model("c", 9, 0.1), "c-rtn": model("c", 9, 0.4),
    }  # fmt: skip
    models["c-rtn"]["summary"]["kl_mean"] = {"value": 0.4, "low": -0.1, "high": 0.9}
    won = evaluations.recovered(evaluation(models))
    assert list(won) == ["a-qat", "c-qat"] and list(won["a-qat"]) == ["a-mse"]
    assert won["a-qat"]["a-mse"]["kl_mean"] == {"value": pytest.approx(50)}
    assert won["c-qat"]["c-rtn"]["kl_mean"]["value"] is None
    kept = evaluation(models) | {"recovered": {"a-qat": {"a-mse": {"kl_mean": estimate(49.0)}}}}
    assert evaluations.recovered(kept)["a-qat"]["a-mse"]["kl_mean"]["low"] == pytest.approx(44.1)


def test_a_run_alone_has_a_headline(run):
    """If this fails, the page of a run that was not evaluated yet leads with nothing, or two runs with one's loss."""
    data = gather([run])
    words = "one: training loss from 2 to 0.5 by step 4, in 32% of the bytes."
    assert headline(data) == words
    assert headline({"runs": {**data["runs"], "two": data["runs"]["one"]}}) == ""


def test_the_headline_is_about_the_nearest_quantized_model():
    """If this fails, the page leads with the float model, or with a worse one than it has."""
    models = {"w4-rtn": model("w4", 1000, 0.4), "w4-qat": model("w4", 1000, 0.1), "f": model("float", 4000, 0.0)}  # fmt: skip
    words = headline({"evaluations": [evaluation(models)]})
    assert words == (
        "w4-qat is 0.1 nats from the-float in mean KL (0.09 to 0.11) and makes the same first choice "
        "on 90.0% of tokens, in 25% of the bytes."
    )


def test_tasks_of_several_files_stand_in_one_table(tmp_path):
    """If this fails, a benchmark that was run is not shown, or beside the wrong model."""

    def tasks(name, value, task):
        one = {"documents": 5, "metrics": {"acc": {"value": value, "stderr": 0.25}}}
        about = {task: {"shots": 3}}
        own = {"documents": 5, "metrics": {"acc": {"value": 0.875, "stderr": None}}}
        return {
            "lm_eval": "0.4.13",
            "tasks": about,
            "models": {name: {"boolq": one}, "reference": {task: own}},
        }

    a, b = ({name: model("w4", 900, 0.1)} for name in ("a-qat", "b-rtn"))
    first = write(tmp_path / "one.json", evaluation(a) | {"tasks": tasks("a-qat", 0.625, "boolq")})
    second = write(tmp_path / "two.json", evaluation(b) | {"tasks": tasks("b-rtn", 0.375, "arc")})
    data = gather([], [first, second])
    (found,) = data["evaluations"]
    assert list(found["tasks"]["models"]) == ["a-qat", "reference", "b-rtn"]
    assert (
        list(found["tasks"]["models"]["reference"])
        == list(found["tasks"]["tasks"])
        == ["boolq", "arc"]
    )
    page = html_page(data)
    row = page[page.index("boolq<small>acc, 3 shots") :]
    assert row.index("0.6250<small>± 0.2500") < row.index("0.3750<small>± 0.2500")
