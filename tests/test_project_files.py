"""The files around the code: hosted workflows, pre-commit, citation and changelog agree with each other."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_workflows_and_documents_call_make_targets_that_exist() -> None:
    targets = {
        n for line in re.findall(r"^([\w -]+):(?!=)", text("Makefile"), re.MULTILINE) for n in line.split()
    }
    targets |= set(re.search(r"^\.PHONY: (.*)$", text("Makefile"), re.MULTILINE).group(1).split())
    files = [*ROOT.glob(".github/workflows/*.yml"), ROOT / "CONTRIBUTING.md", ROOT / ".ci/run"]
    assert len(files) == 5
    called = {
        (file.name, target)
        for file in files
        for line in re.findall(r"\bmake ((?:[a-z][\w-]*\b ?)+)", file.read_text())
        for target in line.split()
    }
    assert {target for _, target in called} >= {"setup", "test"}
    assert {(name, target) for name, target in called if target not in targets} == set()


def test_workflows_give_every_job_the_least_permission() -> None:
    for file in ROOT.glob(".github/workflows/*.yml"):
        workflow = yaml.safe_load(file.read_text())
        assert workflow["permissions"] == {"contents": "read"}, file
        for job in workflow["jobs"].values():
            assert set(job.get("permissions", {})) <= {"id-token", "pages"}, file


def test_pre_commit_runs_the_pinned_ruff() -> None:
    hooks = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    ruff = next(repository["rev"] for repository in hooks if repository["repo"].endswith("ruff-pre-commit"))
    assert f"ruff=={ruff.removeprefix('v')}" in text("constraints-ci.txt").splitlines()


def test_citation_names_the_newest_release_of_the_changelog() -> None:
    releases = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", text("CHANGELOG.md"), re.MULTILINE)
    citation = yaml.safe_load(text("CITATION.cff"))
    assert (citation["version"], citation["date-released"]) == releases[0]
    assert text("CHANGELOG.md").index("## [Unreleased]") < text("CHANGELOG.md").index(
        f"## [{releases[0][0]}]"
    )
