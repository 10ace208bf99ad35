"""The files that describe the installation agree with each other."""

import re
import tomllib

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from fsp.paths import PACKAGE

ROOT = PACKAGE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
ASKED = [Requirement(line) for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]]
PINS = [Requirement(line) for line in LOCK.splitlines() if not line.startswith("#")]
PLATFORMS = [("linux", "Linux", "posix"), ("darwin", "Darwin", "posix"), ("win32", "Windows", "nt")]


def pinned(name: str, python: str, platform: tuple[str, str, str]) -> list[str]:
    """Versions that the lock gives a package on one Python and platform."""
    where = dict(zip(("sys_platform", "platform_system", "os_name"), platform, strict=True))
    where |= {"python_version": python, "python_full_version": f"{python}.9"}
    environment = default_environment() | where
    found = [pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(name)]
    return [str(pin.specifier) for pin in found if pin.marker is None or pin.marker.evaluate(environment)]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked.name)
def test_every_dependency_is_pinned_once_and_within_its_range(asked):
    for python in ("3.11", "3.12", "3.13"):
        for platform in PLATFORMS:
            pins = pinned(asked.name, python, platform)
            assert len(pins) == 1, f"{asked.name} has pins {pins} on Python {python}, {platform[0]}"
            assert re.fullmatch(r"==[^,*]+", pins[0])
            assert asked.specifier.contains(pins[0].removeprefix("=="))


def test_the_lock_names_no_url_file_or_option():
    assert "://" not in LOCK
    assert [pin.name for pin in PINS if pin.url] == []
    assert [line for line in LOCK.splitlines() if line.startswith(("-", "/", "."))] == []


def test_the_conda_environment_is_a_python_the_package_takes_with_the_locked_packages():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    conda = {line.split("=")[0]: line for line in dependencies if isinstance(line, str)}
    assert set(conda) == {"python", "pip"}
    version = re.fullmatch(r"python=(\d+\.\d+)", conda["python"])[1]
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{version}.0")
    assert [line for line in dependencies if isinstance(line, dict)] == [{"pip": ["-r requirements.lock", "-e ."]}]


def test_the_readme_names_both_commands_and_the_makefile_has_every_one_it_names():
    readme, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", readme, re.MULTILINE))
    assert {"reproduce", "test", "demo", "lab"} <= named
    assert named <= set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def test_the_code_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
    """The two examples on one's own network; those on sweeps name functions of the reader's."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    pruned, ensemble, *_ = blocks
    assert "prune(" in pruned
    assert "ensemble" in ensemble
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FSP_PROGRESS", "0")
    exec(pruned + ensemble, {})
    assert [path.name for path in tmp_path.iterdir()] == ["found.safetensors"]
