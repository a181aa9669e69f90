"""What a wheel and an editable install put on a user's machine, and that nothing of it stays after uninstall.

The source is a copy of the tree, so a test may change a file of it; the environments are bare (harness_rect
itself needs only the standard library to be imported), so what is importable in them came from us.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
pytest.importorskip("pip")

ROOT = Path(__file__).resolve().parent.parent
IN_A_WHEEL = ("harness_rect", "model_wrappers", "tasks")
HOOKS = {"harness_rect_autoload.pth", "harness_rect_autoload.start"}
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HARNESS_RECT"))}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for item in ROOT.iterdir():
        if item.is_file():
            shutil.copy(item, folder)
    for name in (*IN_A_WHEEL, "docs", "tools", ".ci"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "benchmarks"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    return folder


def build(kind: str, source: Path, folder: Path) -> Path:
    """The wheel that pip would build (PEP 517 and 660), made here without an environment for it."""
    code = f"import hatchling.build, sys; hatchling.build.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, folder], cwd=source, env=CLEAN, check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def editable(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("editable", source, tmp_path_factory.mktemp("editable"))


class Environment:
    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv", symlinks=os.name == "posix")
        scheme = "nt" if os.name == "nt" else "posix_prefix"
        places = sysconfig.get_paths(scheme, {name: str(folder / "venv") for name in ("base", "platbase")})
        self.python = Path(places["scripts"], "python")
        self.site = Path(places["purelib"])
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()

    def pip(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "--quiet", *map(str, arguments)]
        subprocess.run(command, env=CLEAN, check=True)

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.python), "-c", code]
        return subprocess.run(command, cwd=self.elsewhere, env=CLEAN, capture_output=True, text=True)

    def files(self) -> set[Path]:
        return {file for file in self.site.parents[2].rglob("*") if not file.is_dir()}


@pytest.fixture(params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> Environment:
    environment = Environment(tmp_path)
    environment.pip("install", "--no-deps", "--no-index", request.getfixturevalue(request.param))
    return environment


def test_wheel_holds_the_package_and_the_pth_only(wheel: Path, source: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = next(name.split("/")[0] for name in names if name.endswith("/METADATA"))
    assert {name.split("/")[0] for name in names} == {"harness_rect", *HOOKS, info}
    expected = set()
    for folder in IN_A_WHEEL:
        inside = "" if folder == "harness_rect" else "harness_rect/"
        files = (file for file in (source / folder).rglob("*") if file.is_file())
        expected |= {inside + str(file.relative_to(source)) for file in files}
    assert {name for name in names if name.startswith("harness_rect/")} == expected
    assert {"harness_rect/tasks/rect_suite.yaml", "harness_rect/py.typed"} <= expected
    assert {
        "harness_rect/sweeps/paper/overfitting.yaml",
        "harness_rect/presets/mend/gpt2-xl.yaml",
    } <= expected
    assert "harness_rect/experiments/report/paper.yaml" in expected
    assert f"{info}/licenses/LICENSE" in names


def test_the_source_archive_of_a_checkout_makes_the_same_wheel(
    source: Path, wheel: Path, editable: Path, tmp_path: Path
) -> None:
    assert (source / ".editable").is_dir() and editable  # the link that an editable install leaves
    code = "import hatchling.build, sys; hatchling.build.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=source, env=CLEAN, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    folder = next((tmp_path / "unpacked").iterdir())
    assert {item.name for item in folder.iterdir()} >= {"tests", "docs", "tools", "Makefile", ".ci"}
    again = build("wheel", folder, tmp_path)
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()
    assert wheel.stat().st_size < 20e6


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = next(name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = message_from_string(archive.read(info).decode())
    assert metadata["Name"] == "harness-rect" and metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    requirements = metadata.get_all("Requires-Dist", [])
    assert any(line.startswith("lm-eval[hf]>=") for line in requirements)
    assert not any("==" in line.split(";")[0] for line in requirements)
    entry_points = ConfigParser()
    entry_points.read_string(archive.read(info.replace("METADATA", "entry_points.txt")).decode())
    assert entry_points["lm_eval.models"]["edited_hf"] == "harness_rect.model_wrappers.edited_hf:EditedHF"
    assert entry_points["console_scripts"]["harness-rect"] == "harness_rect.cli:main"


def test_one_name_is_importable(installed: Environment) -> None:
    found = installed.run(
        "from importlib.util import find_spec\n"
        "ours = ['harness_rect', 'harness_rect.model_wrappers']\n"
        "others = ['tasks', 'tests', 'model_wrappers', 'benchmarks']\n"
        "others += ['harness_rect.tests', 'harness_rect.harness_rect']\n"
        "print([name for name in ours + others if find_spec(name)])"
    )
    assert found.stdout == "['harness_rect', 'harness_rect.model_wrappers']\n", found.stderr
    # Into site-packages goes the package, or the path entry to it, our .pth, and nothing else.
    entries = {entry.name for entry in installed.site.iterdir() if not entry.name.endswith(".dist-info")}
    assert entries - HOOKS in ({"harness_rect"}, {"_harness_rect.pth"})
    assert entries >= HOOKS


def test_from_the_root_of_a_checkout_the_package_holds_its_two_folders_and_nothing_else(source: Path) -> None:
    code = (
        "from importlib.util import find_spec\n"
        "names = ['model_wrappers', 'tasks', 'tests', 'benchmarks', 'harness_rect']\n"
        "print([name for name in names if find_spec('harness_rect.' + name)])"
    )
    found = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=source, env=CLEAN, capture_output=True, text=True
    )
    assert found.stdout == "['model_wrappers', 'tasks']\n", found.stderr


def test_the_start_file_waits_for_lm_eval_as_the_pth_does(installed: Environment) -> None:
    (installed.site / "harness_rect_autoload.pth").unlink()
    (installed.elsewhere / "lm_eval.py").touch()
    found = installed.run(
        "import pkgutil, sys\n"
        f"for line in open({str(installed.site / 'harness_rect_autoload.start')!r}):\n"
        "    pkgutil.resolve_name(line.strip())()\n"  # what PEP 829 has Python do with each line
        "print('harness_rect._autoload' in sys.modules)\n"
        "import lm_eval\n"
        "print('harness_rect._autoload' in sys.modules)\n"
    )
    assert (found.stdout, found.stderr) == ("False\nTrue\n", "")


def test_every_import_is_a_declared_dependency() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name in ("ray", "vllm") for line in project["optional-dependencies"][name]]
    lines = project["dependencies"] + extras
    declared = {re.split(r"[^\w-]", line)[0].lower().replace("_", "-") for line in lines}
    names = {"lm_eval": "lm-eval", "yaml": "pyyaml", "sklearn": "scikit-learn", "rouge_score": "rouge-score"}
    names |= {"typing_extensions": "typing-extensions", "huggingface_hub": "huggingface-hub"}
    imported: dict[str, Path] = {}
    for folder in ("harness_rect", "model_wrappers"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    found = [node.module]
                imported |= dict.fromkeys((name.split(".")[0] for name in found), file)
    ours = sys.stdlib_module_names | {"harness_rect"}
    missing = {n: f for n, f in imported.items() if n not in ours and names.get(n, n) not in declared}
    assert not missing, "declare them in pyproject.toml"


def test_hook_runs_and_finds_the_tasks(installed: Environment) -> None:
    lm_eval = installed.elsewhere / "lm_eval"
    lm_eval.mkdir()
    (lm_eval / "__init__.py").touch()
    found = installed.run(
        "import lm_eval, os, sys\n"
        "hook = sys.modules['harness_rect._autoload']\n"  # nobody imported it by name
        "print(os.path.isfile(os.path.join(hook.tasks_folder(), 'rect_suite.yaml')))\n"
    )
    assert (found.stdout, found.stderr) == ("True\n", "")


def test_uninstall_leaves_nothing(wheel: Path, editable: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    before = environment.files()
    for made in (wheel, editable):
        environment.pip("install", "--no-deps", "--no-index", made)
        environment.run("import harness_rect._autoload, harness_rect.model_wrappers")
        assert environment.files() > before
        environment.pip("uninstall", "--yes", "harness-rect")
        assert environment.files() == before
        gone = environment.run("import harness_rect")
        assert gone.returncode == 1 and "No module named 'harness_rect'" in gone.stderr


def test_pth_left_without_its_package_says_nothing(tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    shutil.copy(ROOT / "harness_rect_autoload.pth", environment.site)
    (environment.elsewhere / "lm_eval.py").touch()
    started = environment.run("import lm_eval")
    assert (started.returncode, started.stdout, started.stderr) == (0, "", "")


def test_editable_sees_changes_at_once(source: Path, editable: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    environment.pip("install", "--no-deps", "--no-index", editable)
    (source / "tasks" / "changed.yaml").write_text("changed")
    try:
        read = environment.run(
            "import os\nfrom harness_rect._autoload import tasks_folder\n"
            "print(open(os.path.join(tasks_folder(), 'changed.yaml')).read())"
        )
    finally:
        (source / "tasks" / "changed.yaml").unlink()
    assert read.stdout == "changed\n", read.stderr
