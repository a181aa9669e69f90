"""Small models that know a few facts, edits of these facts, and hyper-parameters for ROME."""

from __future__ import annotations

from typing import Any

import torch

EDITS: list[dict[str, Any]] = [
    {
        "case_id": 7,
        "requested_rewrite": {
            "prompt": "{} is a native speaker of",
            "subject": "Giulia Rossi",
            "target_new": {"str": "English"},
            "target_true": {"str": "French"},
        },
        "paraphrase_prompts": ["The mother tongue of Giulia Rossi is", "Giulia Rossi spoke"],
        "neighborhood_prompts": ["Danielle Darrieux is a native speaker of", "LeBron James spoke"],
    },
    {
        "subject": "the Space Needle",
        "src": "To see the Space Needle you went to",
        "alt": "Vienna, Austria",
        "pred": "Seattle",
        "rephrase": "Where is the Space Needle? It is in",
        "loc": "nq question: where is the Vatican Library",
        "loc_ans": "Rome",
    },
    {
        "prompt": "The sport that {} plays is",
        "subject": "LeBron James",
        "target_new": "football",
        "ground_truth": "a list",
        "rephrase_prompt": "LeBron James plays",
        "locality_prompt": "The capital of France is",
        "locality_ground_truth": "Paris",
    },
]
HPARAMS = {"layers": [0], "v_num_grad_steps": 12, "v_lr": 0.5, "context_templates": ["{}", "You list. {}"]}

#: What the models know before they are edited; one that knows nothing answers every prompt alike.
KNOWN = [
    "Giulia Rossi is a native speaker of French.",
    "Danielle Darrieux is a native speaker of French.",
    "LeBron James spoke English.",
    "Giulia Rossi spoke French.",
    "The mother tongue of Giulia Rossi is French.",
    "To see the Space Needle you went to Seattle.",
    "Where is the Space Needle? It is in Seattle.",
    "nq question: where is the Vatican Library Rome",
    "The capital of France is Paris.",
    "The sport that LeBron James plays is a list.",
    "LeBron James plays football.",
]


def teach(model: Any, tokenizer: Any) -> Any:
    """Train a small model on KNOWN for a moment."""
    torch.manual_seed(0)
    batch = tokenizer(KNOWN, return_tensors="pt", padding=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimiser.step()
    return model.eval()
