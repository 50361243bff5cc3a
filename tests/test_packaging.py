"""What is listed is what is there, and the wheel works outside the checkout."""

import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IGNORED = {"tests", "build", ".venv", "outputs"}


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    found = {
        ".".join(("vlmtune", *file.parent.relative_to(ROOT).parts))
        for file in ROOT.rglob("__init__.py")
        if not IGNORED & set(file.relative_to(ROOT).parts)
    }
    assert set(listed["packages"]) == found


def test_constraints_pin_every_dependency_within_its_bounds():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): pinned for name, pinned in pairs}
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *(r for extra in extras for r in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


@pytest.mark.slow
def test_wheel_installs_into_a_clean_environment_and_imports_outside_the_checkout(tmp_path):
    copy = tmp_path / "source"
    copy.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in tracked:
        if name.startswith("tests/") or not (ROOT / name).is_file():
            continue
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    subprocess.run([*build, copy], check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")

    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {"vlmtune", "vlmtune-0.1.0.dist-info"}
    assert "vlmtune/configs/zero/zero1.json" in names
    assert "vlmtune/py.typed" in names
    assert "vlmtune/cli/assets/page.css" in names

    # The dependencies are those of this environment; the package must come from the wheel alone.
    home = tmp_path / "clean"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True, cwd=tmp_path
    )
    here = next(p for p in sys.path if p.endswith("site-packages"))
    code = (
        "import sys, vlmtune, vlmtune.cli.main\n"
        f"sys.path.append({here!r})\n"
        "import vlmtune.models, vlmtune.sft.train\n"
        "from importlib.resources import files\n"
        "assert files('vlmtune.configs').joinpath('presets/ovis2_5_full.json').is_file()\n"
        "print(vlmtune.__file__)\n"
    )
    found = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).is_relative_to(home)
    version = subprocess.run([home / "bin/vlmtune", "--version"], capture_output=True, text=True)
    assert version.stdout == "vlmtune 0.1.0\n"
