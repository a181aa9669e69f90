"""Rows of an edit file that no model knows: small worlds of sweeps and faults are made of them."""

from __future__ import annotations

SUBJECTS = ("Lake Arvo", "the old mint", "Tomas the cooper", "Hill 62")
FACTS = [
    {
        "prompt": "{} belongs to",
        "subject": subject,
        "target_new": f"guild {i}",
        "target_true": "nobody",
        "rephrase_prompt": f"Who owns {subject}? It is",
        "locality_prompt": "The capital of France is",
        "locality_ground_truth": "Paris",
    }
    for i, subject in enumerate(SUBJECTS)
]
