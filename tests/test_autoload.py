"""Does a stock lm-eval find us, and stay unharmed when it cannot? Each test starts its own interpreters."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TASK = "task: {}\ndataset_path: json\noutput_type: generate_until\ndoc_to_text: a\ndoc_to_target: b\n"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with all that this one has, and our package and `.pth` as in an editable install."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", symlinks=True)
    (folder / "link").mkdir()
    (folder / "link" / "harness_rect").symlink_to(ROOT / "harness_rect")
    site = next(folder.glob("venv/lib/python*/site-packages"))
    (site / "_first.pth").write_text(f"{folder / 'link'}\n{sysconfig.get_path('purelib')}\n")
    shutil.copy(ROOT / "harness_rect_autoload.pth", site)
    return folder / "venv" / "bin" / "python"


@pytest.fixture
def run(python: Path, tmp_path: Path):
    """Runs code, or a command line given as a list, in that environment, far from the source tree."""

    def run(code: str | list[str], fails: bool = False, **extra: str) -> str:
        ours = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HARNESS_RECT"))
        }
        command = [str(python), *(code if isinstance(code, list) else ["-c", code])]
        environment = ours | {"HF_HUB_OFFLINE": "1"} | extra
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def fake_lm_eval(folder: Path, files: dict[str, str] | None = None) -> dict[str, str]:
    """The environment variable that puts these files, in empty packages, before the real lm_eval."""
    empty = dict.fromkeys(("__init__", "api/__init__", "models/__init__", "tasks/__init__"), "")
    for name, text in (empty | (files or {})).items():
        file = folder / "lm_eval" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return {"PYTHONPATH": str(folder)}


def test_nothing_of_ours_is_imported_before_lm_eval_is(run) -> None:
    out = run(
        "import sys\n"
        "print([m for m in sys.modules if m.startswith('harness_rect')])\n"
        "print([f.__name__ for f in sys.meta_path].count('HarnessRect'))"
    )
    assert out == "[]\n1\n"


def test_stock_command_finds_our_tasks(run) -> None:
    script = Path(sysconfig.get_path("scripts"), "lm_eval")
    assert "All tasks found" in run([str(script), "validate", "--tasks", "rect_suite,rect_general"])


# TaskManager takes the folder of its own file for the default one. Reading lm-eval's thousands of files takes
# seconds, so from here on a small one stands in.
FEW_DEFAULTS = """
import logging, pathlib, lm_eval.tasks.manager as manager
from lm_eval.tasks import TaskManager
logging.basicConfig(level="WARNING")
manager.__file__ = str(pathlib.Path("defaults/manager.py").absolute())
"""


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """The small default folder, and a user's that redefines one of our tasks."""
    for folder, task in (("defaults", "theirs"), ("user", "rect_nli"), ("other", "another")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "task.yaml").write_text(TASK.format(task))
    return tmp_path


@pytest.mark.parametrize("off", [False, True])
def test_module_lists_our_tasks_unless_switched_off(run, folders: Path, off: bool) -> None:
    call = "import runpy, sys; sys.argv = ['lm_eval', 'ls', 'tasks']\n"
    call += "runpy.run_module('lm_eval', run_name='__main__')"
    listed = run(FEW_DEFAULTS + call, HARNESS_RECT_AUTOLOAD="0" if off else "1")
    listed = listed.replace(" ", "")
    assert "|theirs|" in listed
    for name in ("rect_suite", "rect_general", "rect_nli"):
        assert (f"|{name}|" in listed) != off


def test_tasks_come_after_the_defaults_and_before_the_users(run, folders: Path) -> None:
    out = run(
        FEW_DEFAULTS + "default = TaskManager()\n"
        "assert {'theirs', 'rect_suite', 'rect_nli'} <= set(default.all_tasks)\n"
        "assert default.include_path is None\n"
        "for given in ('user', pathlib.Path('user'), ['user'], ('other', 'user')):\n"
        "    manager_ = TaskManager(None, given)\n"
        "    assert manager_.include_path is given\n"
        "    assert manager_.task_index['rect_nli'].yaml_path.parts[0] == 'user', given\n"
        "    assert {'theirs', 'rect_suite'} <= set(manager_.all_tasks)\n"
        "assert 'another' in manager_.all_tasks\n"
        "assert TaskManager(include_defaults=False).all_tasks == []\n"
        "assert TaskManager(include_path='user', include_defaults=False).all_tasks == ['rect_nli']\n"
        "try:\n"
        "    TaskManager(no_such_argument=1)\n"
        "except TypeError as error:\n"
        "    assert 'no_such_argument' in str(error)\n"
    )
    assert (
        out.count("overrides existing task") == 4
    )  # lm-eval's word on the user's rect_nli, once a TaskManager


def test_our_folder_given_by_hand_is_read_once(run, folders: Path) -> None:
    code = FEW_DEFAULTS + "for given in {}: assert 'rect_suite' in TaskManager(include_path=given).all_tasks"
    assert run(code.format([str(ROOT / "tasks"), [str(ROOT / "tasks") + "/"]])) == ""


def test_lm_evals_own_models_stay(run) -> None:
    run(
        "from lm_eval.api.registry import get_model, model_registry\n"
        "assert get_model('dummy').__name__ == 'DummyLM'\n"
        "assert model_registry._objs['edited_hf'].value == 'harness_rect.model_wrappers.edited_hf:EditedHF'\n"
        "vllm = model_registry._objs['edited_vllm'].value\n"
        "assert vllm == 'harness_rect.model_wrappers.edited_vllm:EditedVLLM'\n"
        "assert 'hf' in model_registry and 'vllm' in model_registry\n"
        "import sys; assert not any(m.startswith('harness_rect.model') for m in sys.modules)"  # lazily
    )


# lm-eval's repository (to be 0.4.14) loads plugins like this. It is not released: an installed registry
# stands in for its.
PLUGINS = """
from importlib.metadata import entry_points
from lm_eval.api.registry import get_model, model_registry
loaded = []
def load_plugins():
    for entry in entry_points(group="lm_eval.models"):
        model_registry.register(entry.name, target=entry)
        loaded.append(entry.name)
"""


@pytest.mark.parametrize(
    "order", ["load_plugins(); import lm_eval.models", "import lm_eval.models; load_plugins()"]
)
def test_found_by_its_entry_point_and_registered_once_where_lm_eval_loads_plugins(run, order: str) -> None:
    checks = (
        "assert loaded.count('edited_hf') == list(model_registry).count('edited_hf') == 1",
        "assert 'hf' in model_registry and get_model('edited_hf').__name__ == 'EditedHF'",
    )
    run("\n".join([PLUGINS + order, *checks]))


def test_an_edited_hf_of_the_users_own_stays(run) -> None:
    run(
        "from lm_eval.api.registry import model_registry\n"
        "model_registry.register('edited_hf', target='mine:Mine')\n"
        "import lm_eval.models\n"
        "assert model_registry._objs['edited_hf'] == 'mine:Mine'"
    )


def test_by_hand_after_lm_eval_and_twice(run, folders: Path) -> None:
    run(
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if f.__name__ != 'HarnessRect']\n"
        "import lm_eval.models" + FEW_DEFAULTS + "import importlib, harness_rect._autoload\n"
        "from lm_eval.api.registry import model_registry\n"
        "assert 'edited_hf' in model_registry and 'rect_suite' in TaskManager().all_tasks\n"
        "served = TaskManager.__init__; importlib.reload(harness_rect._autoload)\n"
        "assert TaskManager.__init__ is served\n"
        "assert not [f for f in sys.meta_path if type(f).__module__ == 'harness_rect._autoload']"
    )


def test_looking_for_a_module_is_not_importing_it(run) -> None:
    run(
        "import inspect, sys\n"
        "from importlib.util import find_spec\n"
        "find_spec('lm_eval.tasks.manager'); find_spec('lm_eval.models')\n"
        "from lm_eval.tasks import manager\n"
        "import lm_eval.models\n"
        "from lm_eval.api.registry import model_registry\n"
        "assert hasattr(manager.TaskManager.__init__, '_harness_rect') and 'edited_hf' in model_registry\n"
        "assert type(manager.__loader__).__name__ == 'SourceFileLoader'\n"
        "assert inspect.getsource(manager) and manager.TaskManager.__init__.__doc__\n"
        "assert not any(type(f).__module__ == 'harness_rect._autoload' for f in sys.meta_path)"
    )


BROKEN = {
    "empty": {},
    "other signature": {
        "tasks/manager": "class TaskManager:\n    def __init__(self, folders=()): self.f = folders"
    },
    "no class": {"tasks/manager": "TaskManager = None"},
    "no registry": {"api/registry": "model_registry = None"},
    "refusing registry": {
        "api/registry": "class R(dict):\n    def register(self, *a, **k): raise ValueError('frozen')\n"
        "model_registry = R()"
    },
    "failing registry": {"api/registry": "raise RuntimeError('half installed')"},
}


@pytest.mark.parametrize("files", BROKEN.values(), ids=BROKEN.keys())
def test_an_lm_eval_we_do_not_know_works_without_us(run, tmp_path: Path, files: dict[str, str]) -> None:
    code = "import lm_eval.models, lm_eval.tasks.manager as m\nprint(m.TaskManager and m.TaskManager(()).f)"
    manager = {"tasks/manager": "class TaskManager:\n    def __init__(self, folders): self.f = folders"}
    assert run(code, **fake_lm_eval(tmp_path, manager | files)) in ("()\n", "None\n")


def test_an_error_in_lm_eval_is_still_lm_evals(run, tmp_path: Path) -> None:
    fake = fake_lm_eval(tmp_path, {"models/__init__": "raise RuntimeError('their own trouble')"})
    assert "RuntimeError: their own trouble" in run("import lm_eval.models", fails=True, **fake)
    missing = run("import lm_eval.tasks.manager", fails=True, **fake)
    assert "ModuleNotFoundError: No module named 'lm_eval.tasks.manager'" in missing


def test_a_broken_package_of_ours_harms_nobody(run, tmp_path: Path) -> None:
    (tmp_path / "harness_rect").mkdir()
    (tmp_path / "harness_rect" / "__init__.py").write_text("raise ImportError('half removed')")
    assert run("import lm_eval; print('fine')", **fake_lm_eval(tmp_path)) == "fine\n"
