"""A reader's first minutes in a browser, with the JupyterLab that `make lab` starts: `make browser`."""

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import nbformat
import pytest

from fsp.paths import PACKAGE

ROOT = PACKAGE.parent
PICTURES = ROOT / "build" / "browser"  # what was seen
OVERVIEW = [path.stem for path in ROOT.glob("notebooks/00_*.ipynb")]
CORRELATION = "04_weighted_gap_correlation"
PATIENCE_S = 1200  # for a notebook on a busy machine

# Where the tests depart from a fresh JupyterLab: all cells are in the page at once, and nobody asks about news.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
PROMPTS = "return [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent)"
# Printed text that is higher than its lines.
WRAPPED = """
return [...document.querySelectorAll(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stdout'] pre")]
  .filter(e => e.clientHeight > (e.textContent.replace(/\\n$/, "").split("\\n").length + 0.5)
                                * parseFloat(getComputedStyle(e).lineHeight))
  .map(e => e.textContent);
"""
# The least opacity, of 255, in the four corners of each figure.
GROUNDS = """
return [...document.querySelectorAll(".jp-RenderedImage img")].map(image => {
  const canvas = document.createElement("canvas"), [w, h] = [image.naturalWidth, image.naturalHeight];
  Object.assign(canvas, {width: w, height: h});
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const corners = [[0, 0], [w - 1, 0], [0, h - 1], [w - 1, h - 1]];
  return Math.min(...corners.map(([x, y]) => context.getImageData(x, y, 1, 1).data[3]));
});
"""

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore")]


def until(happened, seconds=PATIENCE_S):
    """Wait for an event, and fail rather than wait for ever; a page that redraws itself is looked at again."""
    from selenium.common.exceptions import StaleElementReferenceException

    end = time.monotonic() + seconds
    while True:
        with suppress(StaleElementReferenceException):
            if found := happened():
                return found
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.5)


class Window:
    """A browser's window on JupyterLab, and what a reader does there."""

    def __init__(self, driver, root: Path):
        self.driver, self.root, self.notebook = driver, root, ""

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def named(self, selector: str, text: str):
        """The element with this text, once it is there."""
        return until(lambda: [element for element in self.all(selector) if element.text == text], 60)[0]

    def opens(self, stem: str) -> None:
        """A notebook as it was committed; one that is opened again has the kernel that it had."""
        self.notebook = stem
        shutil.copy(ROOT / "notebooks" / f"{stem}.ipynb", self.root / "notebooks")
        address = self.driver.current_url.split("/lab")[0]
        self.driver.get(f"{address}/lab/tree/notebooks/{stem}.ipynb?reset")
        until(lambda: any("| Idle" in item.text for item in self.all(".jp-StatusBar-TextItem")))
        until(lambda: len(self.all(".jp-Notebook .jp-Cell")) == len(self.saved().cells))

    def chooses(self, menu: str, *entries: str) -> None:
        self.named(".lm-MenuBar-itemLabel", menu).click()
        for entry in entries:
            self.named(".lm-Menu-itemLabel", entry).click()

    def edits(self, start: str, text: str) -> None:
        """Type a text instead of the one line of the parameters cell that starts so."""
        from selenium.webdriver import ActionChains, Keys

        [cell] = self.all(".jp-CodeCell:nth-child(2)")
        self.driver.execute_script("arguments[0].scrollIntoView()", cell)
        [line] = until(lambda: [one for one in cell.find_elements("css selector", ".cm-line") if start in one.text])
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", line)
        line.click()
        keys = ActionChains(self.driver).send_keys(Keys.END).key_down(Keys.SHIFT).send_keys(Keys.HOME)
        keys.key_up(Keys.SHIFT).send_keys(text).perform()
        until(lambda: text in cell.text, 10)

    def runs_all(self) -> nbformat.NotebookNode:
        """Every cell; the notebook as JupyterLab saves it then."""
        self.chooses("Edit", "Clear Outputs of All Cells")
        self.chooses("Run", "Run All Cells")
        until(self.ended)
        written = self.file.stat().st_mtime_ns
        self.chooses("File", "Save Notebook")
        until(lambda: self.file.stat().st_mtime_ns > written, 60)
        return self.saved()

    def ended(self) -> bool:
        prompts = self.driver.execute_script(PROMPTS)
        return "[*]:" not in prompts and any(re.fullmatch(r"\[\d+\]:", prompt) for prompt in prompts)

    @property
    def file(self) -> Path:
        return self.root / "notebooks" / f"{self.notebook}.ipynb"

    def saved(self) -> nbformat.NotebookNode:
        return nbformat.read(self.file, as_version=4)

    def looks_at(self, selector: str, name: str):
        """Scroll to the first such element and take a picture of the window."""
        element = self.all(selector)[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        until(element.is_displayed, 10)
        self.takes_picture(name)
        return element

    def takes_picture(self, name: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(PICTURES / f"{self.notebook}_{name}.png")


@pytest.fixture(scope="module")
def driver():
    """A headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: see `make browser`")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("Chromium is not installed: on Debian, apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1400,1000"):
        options.add_argument(f"--{flag}")
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository without downloads and records: JupyterLab saves what a reader changes."""
    root = tmp_path_factory.mktemp("copy") / "fsp"
    for name in ("fsp", "notebooks", "figures", "docs", "data"):
        junk = ("raw", "runs") if name == "data" else ("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(*junk))
    for name in ("README.md", "Makefile"):
        shutil.copy(ROOT / name, root)
    return root


@pytest.fixture(scope="module")
def address(copy, tmp_path_factory):
    """What `make lab` hands to a browser; its settings are nobody's."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    home = tmp_path_factory.mktemp("home")
    (home / "jupyter_server_config.json").write_text('{"ServerApp": {"allow_root": true}}', "utf-8")
    for name, settings in SETTINGS.items():
        path = home / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), "utf-8")
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(home),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
        "PYTHONPATH": str(copy),
        "BROWSER": "echo make lab opens %s",
    }
    for name in ("FSP_ROOT", "FSP_RENEW", "FSP_PROGRESS", "MPLBACKEND"):
        environment.pop(name, None)
    command = ["make", "--old-file=.venv/installed", "lab", f"BIN={Path(sys.executable).parent}"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    server = subprocess.Popen(command, cwd=copy, env=environment, **options)
    said = queue.SimpleQueue()
    Thread(target=lambda: [said.put(line) for line in server.stdout], daemon=True).start()
    try:
        told = []
        while not (told and told[-1].startswith("make lab opens ")):
            told += [until(lambda: not said.empty() and said.get(), 120)]
        yield told[-1].split()[-1]
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # make, the server and its kernels
        server.wait(60)


@pytest.fixture(scope="module")
def window(driver, copy, address):
    """What `make lab` opens."""
    driver.get(address)
    return Window(driver, copy)


def errors_of(notebook: nbformat.NotebookNode) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [f"{output.ename}: {output.evalue}" for output in outputs if output.output_type == "error"]


def printed_by(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def test_make_lab_shows_the_repository_and_its_overview(window):
    """The first look: README, notebooks and figures beside the overview, where there is one."""
    wanted = {"README.md", "notebooks", "figures"} if not OVERVIEW else {f"{OVERVIEW[0]}.ipynb"}
    until(lambda: wanted <= {item.text for item in window.all(".jp-DirListing-itemText, .lm-TabBar-tabLabel")}, 120)
    window.takes_picture("first_look")


@pytest.mark.parametrize("stem", [*OVERVIEW, CORRELATION])
def test_a_notebook_runs_to_its_end_and_shows_its_figures_in_light_and_dark(window, stem):
    window.opens(stem)
    done = window.runs_all()
    assert errors_of(done) == []
    assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code")
    assert window.driver.execute_script(WRAPPED) == []
    assert set(window.driver.execute_script(GROUNDS)) == {255}
    window.looks_at(".jp-RenderedImage img", "light")
    window.looks_at(".jp-RenderedHTMLCommon table.dataframe", "table")
    window.chooses("Settings", "Theme", "JupyterLab Dark")
    until(lambda: window.all("body[data-jp-theme-light='false']"), 60)
    window.looks_at(".jp-RenderedImage img", "dark")
    window.chooses("Settings", "Theme", "JupyterLab Light")
    until(lambda: window.all("body[data-jp-theme-light='true']"), 60)


def test_a_changed_parameter_changes_what_is_shown(window):
    window.opens(CORRELATION)
    window.edits("densities: list", "densities: list = [0.1]  # one alone")
    done = window.runs_all()
    assert errors_of(done) == []
    assert "130 masks, 0 of them without a finished training" in printed_by(done)
    window.looks_at(".jp-RenderedImage img", "changed")


def test_a_wrong_value_stops_the_notebook_with_a_sentence_that_names_the_right_one(window):
    window.opens(CORRELATION)
    window.edits("dataset: str", 'dataset: str = "mnist2d"  # there is none')
    [error] = errors_of(window.runs_all())
    assert re.fullmatch(r"ValueError: dataset = 'mnist2d': expected one of .*; did you mean mnist1d\?", error)
    shown = window.looks_at(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']", "wrong")
    assert error in " ".join(shown.text.split())
