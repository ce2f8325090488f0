"""`gemma-qat report`: a page, its numbers and its figures from one command; one line for bad input."""

import json

from report_files import evaluation, run_folder, write

from gemma_qat.cli.main import main


def test_page_numbers_and_figures_are_written(tmp_path, capsys):
    """If this fails, the command does not leave what it says: a page, its numbers, its figures."""
    run = run_folder(tmp_path / "one")
    (run / "codes.json").unlink()
    (run / "coverage.json").unlink()
    measured = evaluation()
    for model in measured["models"].values():
        del model["positions"], model["categories"]
    found = write(tmp_path / "e.json", measured)
    out = tmp_path / "new" / "out"
    assert main(["report", str(run), "--evaluation", str(found), "--out", str(out), "--title", "Ours"]) == 0  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == ["figures", "report.html", "report.json"]
    data = json.loads((out / "report.json").read_text())
    assert data["title"] == "Ours" and data["evaluations"][0]["models"]["w4-qat"]["bytes"] == 1000
    figures = list((out / "figures").iterdir())
    assert {"loss.png", "quality_against_bytes.png", "kl_histogram.png"} <= {
        f.name for f in figures
    }
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)
    said = capsys.readouterr().out
    assert "w4-qat is 0.1 nats" in said and f"{len(figures)} figures" in said


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys):
    """If this fails, a folder that is no run leaves half a report or a traceback."""
    out = tmp_path / "out"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{tmp_path}: no run" in said
    assert not out.exists()
    file = write(tmp_path / "file", "")
    assert main(["report", str(run_folder(tmp_path / "r")), "--out", str(file)]) == 2


def test_one_run_has_its_page_in_its_folder(tmp_path, capsys):
    """If this fails, the page of one run has to be asked for with a directory, or lands beside another's."""
    run = run_folder(tmp_path / "one")
    assert main(["report", str(run)]) == 0
    assert {"report.html", "report.json", "figures"} <= {path.name for path in run.iterdir()}
    other = run_folder(tmp_path / "two")
    capsys.readouterr()
    for runs in ([run, other], [], [tmp_path / "nowhere"]):
        assert main(["report", *map(str, runs)]) == 2
        assert "--out DIR is expected" in capsys.readouterr().err


def test_a_page_holds_no_credentials_of_an_older_config(tmp_path):
    """If this fails, a page that is mailed gives away what an older version left in config.json."""
    run = run_folder(tmp_path / "one")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "start": "s3://me:hunter2@host/x"}))
    assert main(["report", str(run)]) == 0
    assert "hunter2" not in (run / "report.html").read_text() + (run / "report.json").read_text()
