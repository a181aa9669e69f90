"""What the documentation shows works as it stands."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import sys
import textwrap
import zipfile
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hatchling.build import build_wheel
from lm_eval.__main__ import cli_evaluate
from lm_eval._cli import HarnessCLI
from support import tiny_models
from support.our_tasks import without_lm_evals_tasks

import harness_rect._autoload  # lets lm-eval find the model and the tasks
from harness_rect import cli, embedded
from harness_rect.cli.edit import described_by
from harness_rect.config import EditConfig
from harness_rect.edits import load_edits
from harness_rect.edits.public import URLS
from harness_rect.edits.readers import edits_of, split_spec
from harness_rect.evaluation.catalogue import GROUPS, TASKS, Group, Task
from harness_rect.evaluation.data import SOURCES, Source
from harness_rect.experiments.sweep import named
from harness_rect.experiments.sweep.plan import SweepConfig
from harness_rect.methods import METHODS, Method
from harness_rect.model_wrappers import edited_hf
from harness_rect.regularizers import REGULARIZERS, Regularizer

DOCS = Path(__file__).parent.parent / "docs"


#: Fenced blocks: language, title (the file that a reader puts it into) and text.
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', flags=re.DOTALL | re.MULTILINE)

#: Tutorials; one that goes on where another ended comes after it.
TUTORIALS = [
    ("edit_your_model",),
    ("paper_figure", "rect_or_smaller_steps"),
    ("your_own_method",),
    ("on_a_cluster",),
]


#: Where an entry of a type is looked up by name.
TABLES = {Method: METHODS, Regularizer: REGULARIZERS, Task: TASKS, Group: GROUPS, Source: SOURCES}


@pytest.fixture
def registries(monkeypatch):
    """Packages and model families that a guide adds are gone after the test."""
    for registry in (METHODS, REGULARIZERS):
        monkeypatch.setattr(registry, "_objects", dict(registry._objects))
        monkeypatch.setattr(registry, "_plugins", None)
    monkeypatch.setattr(tiny_models, "FAMILIES", dict(tiny_models.FAMILIES))


def follow(guide: Path, folder: Path, monkeypatch) -> dict[str, Any]:
    """Do what a guide says in ``folder``; the names that its Python blocks without a file define.

    Blocks of new files are written. Those of this package's modules are run in them, and what they define or
    state is registered.
    """
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {"__name__": guide.stem}
    for language, file, text in BLOCK.findall(guide.read_text(encoding="utf-8")):
        if file.startswith("harness_rect/"):
            run_in_module(file.removesuffix(".py").replace("/", "."), text, monkeypatch)
        elif language == "python":
            exec(compile(text, guide.name, "exec"), scope)
        if file:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
    return scope


def run_in_module(name: str, text: str, monkeypatch) -> None:
    """Add ``text`` to a module until the end of the test, and register its methods, tasks, ..."""
    if importlib.util.find_spec(name) is None:
        module, before = ModuleType(name), {}
        monkeypatch.setitem(sys.modules, name, module)
        scope = vars(module)
    else:
        module = importlib.import_module(name)
        before, scope = vars(module), dict(vars(module))
    *body, last = ast.parse(text).body
    stated = last if isinstance(last, ast.Expr) else None  # an entry of a table, as it stands there
    exec(compile(ast.Module(body if stated else [*body, last], []), name, "exec"), scope)
    new = {key: value for key, value in scope.items() if value is not before.get(key)}
    for key, value in new.items():
        monkeypatch.setattr(module, key, value, raising=False)
    if stated:
        new["entry"] = eval(compile(ast.Expression(stated.value), name, "eval"), scope)
    for entry in new.values():
        kind = Regularizer if inspect.isclass(entry) and issubclass(entry, Regularizer) else type(entry)
        if kind in TABLES and entry is not Regularizer:
            monkeypatch.setitem(TABLES[kind], entry.task if kind is Source else entry.name, entry)


@pytest.mark.parametrize("guide", sorted(DOCS.glob("adding_*.md")), ids=lambda path: path.stem)
def test_the_example_of_a_guide_passes_its_own_tests(guide, tmp_path, monkeypatch, registries, request):
    scope = follow(guide, tmp_path, monkeypatch)
    tests = [value for name, value in scope.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test(**{name: request.getfixturevalue(name) for name in inspect.signature(test).parameters})


def test_the_example_of_another_package_adds_a_regularizer(tmp_path, monkeypatch, registries):
    follow(DOCS / "adding_a_regularizer.md", tmp_path, monkeypatch)
    package = tmp_path / "norm-clip"
    (tmp_path / "harness_rect/regularizers/norm_clip.py").rename(package / "norm_clip.py")
    monkeypatch.chdir(package)
    monkeypatch.syspath_prepend(package / build_wheel(str(package)))
    del REGULARIZERS["norm_clip"]
    monkeypatch.setattr(REGULARIZERS, "_plugins", None)
    config = EditConfig.from_args(edits="tiny", regularizer="norm_clip", max_ratio="0.005")
    assert config.regularizer.model_dump() == {"max_ratio": 0.005}
    assert type(config.regularizer).__module__ == "norm_clip"


@pytest.mark.parametrize("names", TUTORIALS, ids=lambda names: names[0])
def test_a_tutorial_can_be_followed(names, tmp_path, monkeypatch, registries, capsys):
    monkeypatch.chdir(tmp_path)
    without_lm_evals_tasks(monkeypatch, tmp_path / "empty")
    for name in names:
        scope: dict[str, Any] = {"__name__": name}
        for language, title, text in BLOCK.findall((DOCS / "tutorials" / f"{name}.md").read_text("utf-8")):
            if title.startswith("Not run by the tests: "):
                continue
            if title == "prints":
                assert capsys.readouterr().out == text
            elif title:
                Path(title).parent.mkdir(parents=True, exist_ok=True)
                Path(title).write_text(text, encoding="utf-8")
            elif language == "bash":
                for line in text.replace("\\\n", "").splitlines():
                    run_command(shlex.split(line), monkeypatch)
            else:
                assert language == "python"
                capsys.readouterr()
                exec(compile(text, name, "exec"), scope)


def run_command(words: list[str], monkeypatch) -> None:
    """A line of a shell, in this process: another one imports torch again."""
    match words:
        case ["harness-rect", *options]:
            assert cli.main(options) == 0
        case ["lm_eval", *_]:
            monkeypatch.setattr(sys, "argv", words)
            cli_evaluate()
        case ["pip", "install", package]:
            with monkeypatch.context() as there:
                there.chdir(package)
                zipfile.ZipFile(build_wheel(".")).extractall("installed")
            monkeypatch.syspath_prepend(Path(package, "installed").resolve())
            for registry in (METHODS, REGULARIZERS):
                monkeypatch.setattr(registry, "_plugins", None)
        case _:
            raise AssertionError(f"not known how to run {words}")


def test_every_tutorial_is_followed():
    followed = {name for names in TUTORIALS for name in names}
    assert followed == {path.stem for path in (DOCS / "tutorials").glob("*.md")}


#: A line that begins with one of the commands, before it only what starts it elsewhere; and its comment.
COMMAND = re.compile(
    r"^(?: {4})?(?:for .*; do |srun |accelerate launch -m |\.venv/bin/|\w+=\S+ )*"
    r"((?:harness-rect|lm_eval) [^`]*?)(?: +#.*|; done)?$",
    flags=re.MULTILINE,
)


def commands_of(text: str) -> list[str]:
    """The command lines of a page, with one of each choice (``a|b``) and 1 for a variable."""
    lines = COMMAND.findall(text.replace("\\\n", " "))
    chosen = (re.sub(r"\[(--[^]]*)\]", r"\1", re.sub(r"(\w+)(?:\|\w+)+", r"\1", line)) for line in lines)
    return [re.sub(r"\$\w+", "1", line) for line in chosen]


def check_edits_known(spec: str) -> None:
    name, _ = split_spec(spec)
    assert name in URLS or name == "tiny" or Path(name).suffix in {".json", ".jsonl"}, spec


def check_command(line: str, monkeypatch) -> None:
    """That a command takes these options, and knows the names that stand in them."""
    words = shlex.split(line)
    if words[0] == "harness-rect":
        given = cli.make_parser(words[1:]).parse_args(words[1:])
        if words[1] == "edit":
            check_edits_known(described_by(given).edits or "")
        if words[1] == "sweep" and "/" in str(given.config):
            assert given.config in named.names() or (DOCS.parent / given.config).is_file()
        return
    monkeypatch.setattr(sys, "argv", words)
    given = HarnessCLI().parse_args()
    arguments = given.model_args or {}
    if given.model in {"edited_hf", "edited_vllm"}:
        ours = {name: value for name, value in arguments.items() if name in edited_hf._ours()}
        assert given.model == "edited_vllm" or set(arguments) <= {*ours, *edited_hf.THEIRS}
        edited_hf._resolve(arguments.get("pretrained") or embedded.NAME, ours)
    tasks = given.tasks if isinstance(given.tasks, list) else given.tasks.split(",")
    assert set(tasks) <= {*TASKS, *GROUPS}
    for edits in ((given.metadata or {}).get("edits"), arguments.get("edits")):
        if edits is not None:
            check_edits_known(edits)


def test_every_command_of_the_documentation_is_understood(monkeypatch):
    wrong, seen = [], 0
    for page in (DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))):
        if page.stem == "your_own_method":  # it names a method that it adds, and is followed whole
            continue
        for line in commands_of(page.read_text("utf-8")):
            seen += 1
            try:
                check_command(line, monkeypatch)
            except (Exception, SystemExit) as error:
                wrong.append(f"{page.name}: {line}: {error!r}")
    assert wrong == []
    assert seen >= 60


def test_the_python_and_the_row_of_the_readme_are_understood():
    text = (DOCS.parent / "README.md").read_text("utf-8")
    python = textwrap.dedent(text.split("## From Python\n")[1].split("\nEvaluation")[0])
    [call] = [c for c in ast.walk(ast.parse(python)) if isinstance(c, ast.Call) and c.keywords]
    given = {one.arg: ast.literal_eval(one.value) for one in call.keywords if one.arg}
    assert ast.unparse(call.func) == "harness_rect.edit"
    EditConfig.from_args(edits=ast.literal_eval(call.args[2]), **given)
    [row] = re.findall(r'^    (\{"prompt".*\})$', text, flags=re.MULTILINE)
    assert len(edits_of([json.loads(row)])) == 1


def test_the_links_of_the_readme_lead_to_files():
    text = (DOCS.parent / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 120
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (DOCS.parent / link).exists(), link


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "reference" / "api.md").read_text("utf-8")
    assert [name for name in harness_rect.__all__ if not re.search(rf"[.`]{name}\b", text)] == []


def test_the_generated_tables_are_up_to_date():
    sys.path.insert(0, str(DOCS.parent))  # the tools are not installed
    try:
        from tools.docs_tables import TABLES, options_for_help, pages, rewritten
        from tools.error_messages import ADVICE, advice_on, messages
    finally:
        sys.path.pop(0)
    used = set()
    for page in pages():
        text = page.read_text(encoding="utf-8")
        assert rewritten(text) == text, f"{page.name}: run python -m tools.docs_tables"
        used |= set(re.findall(r"<!-- table: (\w+) -->", text))
    assert used == set(TABLES)
    for kind, texts in ADVICE.items():
        found = messages(kind).items()
        assert {advice_on(one, module, kind)[0] for module, all in found for one in all} == set(texts), kind
    assert options_for_help() == Path(cli.HELP).read_text(encoding="utf-8"), "run python -m tools.docs_tables"


def test_what_is_filled_into_a_message_has_a_readable_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS.parent)
    from tools.error_messages import _text

    message = (
        """f"{where}: {LONGEST >> 20} MiB, 0 to {n - 1}, {name.split('/')[0]!r}, {', '.join(_all)}" + more"""
    )
    expected = "<where>: <number> MiB, 0 to <number>, <name>, <all><more>"
    assert _text(ast.parse(message, mode="eval").body) == expected


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_metric_is_defined(task: Task) -> None:
    sections = re.split(r"^## ", (DOCS / "metrics.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = "".join(section for section in sections if f"`{task.name}`" in section)
    names = {metric.name.removesuffix("_gen") for metric in task.metrics}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_every_key_of_a_sweep_is_described():
    text = (DOCS / "sweep.md").read_text(encoding="utf-8")
    described = {
        key
        for row in re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE)
        for key in re.findall(r"`(\w+)`", row)
    }
    assert described - {"model"} == set(SweepConfig.model_fields)


def test_the_row_with_everything_fills_every_field_of_an_edit(tmp_path):
    (row,) = (
        text
        for language, _, text in BLOCK.findall((DOCS / "edit_files.md").read_text("utf-8"))
        if language == "json"
    )
    (tmp_path / "row.json").write_text(f"[{row}]")
    (edit,) = load_edits(str(tmp_path / "row.json"))
    assert [field.name for field in fields(edit) if not getattr(edit, field.name)] == []
