"""Edits as lm-eval documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import datasets

from harness_rect import embedded
from harness_rect.edits import Edit, load_edits
from harness_rect.errors import UserError, one_line_errors


def edits_for_tasks(**metadata: Any) -> dict[str, datasets.Dataset]:
    """The applied edits as documents with all that edits have (``custom_dataset`` of every editing task).

    Args:
        **metadata: model_args merged with ``--metadata``; ``edits`` is read here.

    Raises:
        UserError: without ``edits``, or where they cannot be read.
    """
    with one_line_errors():
        spec = embedded.of_tasks(metadata).get("edits")
        if spec is None:
            raise UserError(
                "the editing tasks need edits: give edits=FILE[start:stop] in --model_args, or in --metadata"
                " for a model that is not edited_hf"
            )
        return {"test": documents(load_edits(str(spec)))}


def documents(edits: Iterable[Edit]) -> datasets.Dataset:
    """A row for each edit. ``neighborhood`` has the locality prompts with a reference answer."""
    return datasets.Dataset.from_list([_document(edit) for edit in edits])


def _document(edit: Edit) -> dict[str, Any]:
    return {
        "id": edit.id,
        "subject": edit.subject,
        "prompt": edit.text,
        "target_new": edit.target_new,
        "target_old": edit.target_old,
        "paraphrases": list(edit.paraphrases),
        "neighborhood": [asdict(probe) for probe in edit.neighborhood if probe.answer is not None],
        "locality_prompts": [probe.prompt for probe in edit.neighborhood],
        "attribute_prompts": list(edit.attribute_prompts),
        "generation_prompts": list(edit.generation_prompts),
        "reference_texts": list(edit.reference_texts),
        "consequences": [asdict(test) for test in edit.consequences],
        "multi_hop": None if edit.multi_hop is None else asdict(edit.multi_hop),
        "relation": edit.relation,
        "target_id": edit.target_id,
    }
