"""What is read while layers are edited equals what whole passes read."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import FAMILIES, TWO_FACTS, depth

from harness_rect.methods import fact_reader
from harness_rect.methods.fact_reader import FactReader


@pytest.mark.parametrize(
    "groups", [[["{}"], ["The city is large. {}", "Then {}"]], [["The city is large. {}"]]]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_held_blocks_are_not_run_again_and_nothing_else_changes(family, groups, make_lm, monkeypatch):
    """With the bare prompt among the contexts and without, in one batch and in many."""
    lm = make_lm(family, **depth(family, 4))
    monkeypatch.setattr(fact_reader, "CHUNK_TOKENS", 20)
    reader, last = FactReader(lm, TWO_FACTS, groups), 3
    runs: list[int] = []
    attention = next(m for name, m in lm.block(0).named_modules() if name.endswith(("attn", "attention")))
    attention.register_forward_hook(lambda *args: runs.append(1))
    for layer in (1, 3):
        runs.clear()
        held = reader.keys([layer], hold=True)[layer]
        assert bool(runs) == (layer == 1)  # blocks below the first edited one are run once
        torch.testing.assert_close(held, FactReader(lm, TWO_FACTS, groups).keys([layer])[layer])
        with torch.no_grad():
            lm.weight(lm.architecture.weight_name(layer)).mul_(1.5)
        torch.testing.assert_close(
            reader.bare_outputs(last),
            FactReader(lm, TWO_FACTS, groups).bare_outputs(last),
            rtol=1e-4,
            atol=1e-5,
        )


def test_keys_of_several_layers_come_from_one_pass(make_lm, monkeypatch):
    lm, passes = make_lm("gpt2"), []
    lm.model.transformer.wte.register_forward_hook(lambda *args: passes.append(1))
    reader = FactReader(lm, TWO_FACTS, [["{}"]])
    found = reader.keys([0, 1])
    assert len(passes) == 1
    for layer in (0, 1):
        torch.testing.assert_close(found[layer], reader.keys([layer])[layer])


def test_a_hook_of_the_users_counts_once(make_lm):
    """What is kept of a block is what it returned, before its hooks, which run each time."""
    lm = make_lm("llama", num_hidden_layers=4)

    def louder(module, args, output):
        return (output[0] * 1.3, *output[1:]) if isinstance(output, tuple) else output * 1.3

    lm.block(1).register_forward_hook(louder)
    reader = FactReader(lm, TWO_FACTS, [["{}"], ["The city is large. {}"]])
    held = reader.keys([2], hold=True)[2]
    again, outputs = reader.keys([3])[3], reader.bare_outputs(3)
    fresh = FactReader(lm, TWO_FACTS, [["{}"], ["The city is large. {}"]])
    torch.testing.assert_close(held, fresh.keys([2])[2])
    torch.testing.assert_close(again, fresh.keys([3])[3])
    torch.testing.assert_close(outputs, fresh.bare_outputs(3))
