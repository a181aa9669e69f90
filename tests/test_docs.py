"""What the documentation shows works as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from support.tiny_models import make_edit

from harness_rect.config import EditConfig
from harness_rect.methods import METHODS
from harness_rect.session import EditSession

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_example_method_edits_by_its_gradient(family, make_lm):
    text = (DOCS / "adding_a_method.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    try:
        exec(compile(code, "adding_a_method.md", "exec"), {"__name__": "example"})
        lm = make_lm(family)
        weight = lm.weight(lm.architecture.weight_name(1))
        before = weight.detach().clone()
        edit = make_edit()
        prompt, target = lm.encoder.continuation(edit.text, edit.target)
        weight.requires_grad_(True)
        logits = lm.model(torch.tensor([prompt + target[:-1]])).logits[0, len(prompt) - 1 :]
        (gradient,) = torch.autograd.grad(
            torch.nn.functional.cross_entropy(logits, torch.tensor(target)), weight
        )
        weight.requires_grad_(False)
        report = EditSession(
            lm.model, lm.encoder.tokenizer, EditConfig(method="step", edits="one"), [edit]
        ).run()
        torch.testing.assert_close(weight.detach() - before, -0.1 * gradient, rtol=1e-3, atol=1e-5)
        assert report["flagged"] == {}
    finally:
        METHODS.pop("step", None)


def test_the_generated_tables_are_up_to_date():
    sys.path.insert(0, str(DOCS.parent))  # the tools are not installed
    try:
        from tools.docs_tables import TABLES, pages, rewritten
    finally:
        sys.path.pop(0)
    used = set()
    for page in pages():
        text = page.read_text(encoding="utf-8")
        assert rewritten(text) == text, f"{page.name}: run python -m tools.docs_tables"
        used |= set(re.findall(r"<!-- table: (\w+) -->", text))
    assert used == set(TABLES)


def test_the_command_line_names_every_method():
    from harness_rect import cli

    (commands,) = (action for action in cli._parser(["edit"])._actions if isinstance(action.choices, dict))
    text = commands.choices["edit"].format_help()
    for name in METHODS:
        assert name in text, name
