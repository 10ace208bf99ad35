"""The progress bar in a terminal, in a file and in a notebook: one at a time, and nothing of it stays in a notebook."""

import threading

import nbformat
import papermill
import pytest

from fsp import progress


@pytest.fixture(autouse=True)
def _shown(monkeypatch):
    monkeypatch.delenv("FSP_PROGRESS", raising=False)
    monkeypatch.setattr(progress._Lines, "last", -progress.LINE_S)


def test_a_file_gets_numbers_in_plain_lines_at_most_one_in_ten_seconds_whatever_the_bars(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    for _ in range(3):
        with progress.bar(total=40, desc="runs") as bar:
            for _ in range(40):
                now += 0.125
                bar.update()
                bar.refresh()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:3] for line in lines] == [["runs:", "0%", "0/40"], ["runs:", "100%", "40/40"]]


def test_a_terminal_gets_the_bar_of_tqdm(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress.bar([1, 2], desc="runs")) == [1, 2]
    assert "runs: 100%|" in capsys.readouterr().err


def test_a_bar_that_is_opened_while_another_is_open_shows_nothing(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_S", 0)
    with progress.bar(total=2, desc="outer") as outer:
        assert list(progress.bar([1, 2], desc="inner")) == [1, 2]
        thread = threading.Thread(target=lambda: list(progress.bar([1, 2], desc="thread")))
        thread.start()
        thread.join()
        outer.update(2)
    with progress.bar(total=2, desc="next"):
        pass
    assert {line.split(":")[0] for line in capsys.readouterr().err.splitlines()} == {"outer", "next"}


def test_the_environment_silences_every_bar(capsys, monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")
    assert list(progress.bar([1, 2])) == [1, 2]
    assert capsys.readouterr().err == ""


CELL = """\
import IPython.display, time
from fsp.progress import bar

texts = []
show = IPython.display.publish_display_data
def seen(data, **options):
    texts.append(data["text/plain"])
    show(data, **options)
IPython.display.publish_display_data = IPython.core.display_functions.publish_display_data = seen
for i in bar(range(3), desc="outer"):
    for j in bar(range(3), desc="inner"):
        time.sleep(0.1)
    time.sleep(0.5)
assert len(texts) > 2, texts
assert all("outer" in text for text in texts[:-1]), texts
"""


def test_an_executed_notebook_keeps_nothing_of_nested_bars(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nbformat.write(notebook, tmp_path / "in.ipynb")
    options = {"kernel_name": "python3", "progress_bar": False, "extra_arguments": ["--log-level=CRITICAL"]}
    (cell,) = papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", **options).cells
    assert [output.data for output in cell.outputs] == [{"text/plain": ""}]
