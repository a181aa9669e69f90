"""The functions of :mod:`harness_rect`: :func:`edit`, :func:`compare` and :func:`report`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness_rect import embedded
from harness_rect.config import EditConfig, Measured, declared_arguments
from harness_rect.edits import Edit, edits_of, load_edits
from harness_rect.errors import UserError, did_you_mean
from harness_rect.experiments import results
from harness_rect.experiments.compare import ComparisonTable, Gate
from harness_rect.experiments.compare import compare as compare_results
from harness_rect.methods import METHODS, check_edits
from harness_rect.moments.layout import layout_name
from harness_rect.session.runs import EditCache
from harness_rect.session.stream import EditSession

#: A name or path with an optional slice, as ``edits=`` takes it, or the facts themselves.
Edits = str | PathLike[str] | Iterable[Mapping[str, Any] | Edit]


@contextmanager
def edit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Edits,
    method: str = "rome",
    *,
    regularizer: str | None = None,
    keep: float | str | None = None,
    edit_batch_size: int = 1,
    hparams: str | PathLike[str] | None = None,
    stats: str | PathLike[str] | None = None,
    edit_cache: str | PathLike[str] | None = None,
    edit_seed: int = 0,
    measure: Measured = "teacher_forced",
    apply_chat_template: bool | str = False,
    system_instruction: str | None = None,
    **settings: Any,
) -> Iterator[EditSession]:
    """Edit a model in place for the length of a ``with`` block, and revert it bit for bit.

        with harness_rect.edit(model, tokenizer, "zsre[0:20]", regularizer="rect", keep=0.4) as session:
            ...  # the model is edited; session.report says what was done and how the edits did

    The arguments are those of ``--model_args``, checked by the same code, and give the same weights, bit for
    bit, as ``lm_eval --model edited_hf`` with them. A finished run is kept and found again as there. Edits of
    one model may be nested, and end in the reverse order; two threads must not edit one model at a time.

    Args:
        model: a transformers causal LM, on any device and in any dtype; nothing but its edited weights
            changes. ``harness_rect.embedded.resolve_model("rect-tiny")`` is the folder of an embedded one.
        tokenizer: its tokenizer.
        edits: ``"zsre[0:20]"``, ``"facts.jsonl"``, ...; or rows as dicts, such as
            ``{"prompt": "The capital of {} is", "subject": "Australia", "target_new": "Sydney"}``, or
            :class:`Edit` objects.
        method: rome, memit, ...: ``harness_rect.methods.METHODS`` has all.
        regularizer: what is applied to each update: rect (Gu et al. 2024, section 5), random, scale, ...
        keep: the share of each update that it keeps (0.4 or "40%"), or what ``keep`` means for it.
        edit_batch_size: facts edited together.
        hparams: a preset's name or a JSON or YAML file; by default the preset of the model's family.
        stats: folder of second moments; by default computed and kept in the user's cache.
        edit_cache: folder where finished runs are kept, or ``"off"``; by default the user's cache.
        edit_seed: seed of all random choices.
        measure: teacher_forced, or generated for generated answers besides.
        apply_chat_template: edit in a chat, as :class:`EditConfig` says.
        system_instruction: the system's turn of that chat.
        **settings: settings of other regularizers (``alpha``, ``base``, ``rect_convention``, ...), or
            ``rect=0.4`` for ``regularizer="rect", keep=0.4``.

    Yields:
        the :class:`EditSession`, whose ``report`` is an :class:`EditReport`.

    Raises:
        UserError: an argument, an edit or the model is wrong; one line, before any weight is changed.
    """
    given = {
        **{"method": method, "regularizer": regularizer, "keep": keep, "edit_batch_size": edit_batch_size},
        **{"hparams": hparams, "stats": stats, "edit_cache": edit_cache, "edit_seed": edit_seed},
        **{"measure": measure, "apply_chat_template": apply_chat_template},
        **{"system_instruction": system_instruction, **settings},
    }
    known = declared_arguments()
    for name in given.keys() - known.keys():
        raise UserError(f"edit(): unknown argument {name!r}: {did_you_mean(name, known)}")
    named = isinstance(edits, str | PathLike)
    spec = str(edits) if named else "a list"
    config = EditConfig.from_args("edit()", edits=spec, **given)
    stream = load_edits(edits) if isinstance(edits, str | PathLike) else edits_of(edits)
    if config.method != "none":
        check_edits(METHODS[config.method], stream)
    folder = getattr(model, "name_or_path", "") or ""
    session = EditSession(model, tokenizer, config, stream, embedded.name_of(folder) or layout_name(folder))
    session.run(EditCache.from_spec(config.edit_cache))
    try:
        yield session
    finally:
        session.revert()


def compare(
    base: str | PathLike[str],
    *others: str | PathLike[str],
    tasks: Sequence[str] | None = None,
    all_metrics: bool = False,
    min_retention: Sequence[str | float] = (),
    allow_differences: bool = False,
) -> ComparisonTable:
    """Evaluations side by side, as ``harness-rect compare`` has them.

    Args:
        base: a results file of lm-eval; of a folder, the newest in it.
        *others: those to compare with it, likewise.
        tasks: only these tasks and groups.
        all_metrics: every metric, not only the headline of each task.
        min_retention: gates such as 0.94 or ``"rect_nli=0.9"``; rows below theirs are in ``failed``.
        allow_differences: compare in spite of differences in version, data, seeds, ...

    Returns:
        the rows, each with scores, change, retention (other / base), 95% interval and p-values.

    Raises:
        UserError: a file cannot be read, or the evaluations cannot be compared.
    """
    if not others:
        raise UserError("compare(): nothing to compare with the first results; give others too")
    sources = [_path(source, "compare()") for source in (base, *others)]
    first, *rest = (results.load(results.newest(source)[0]) for source in sources)
    gates = [Gate.parse(str(text)) for text in min_retention]
    return compare_results(
        first, rest, tasks=tasks, all_metrics=all_metrics, gates=gates, allow_differences=allow_differences
    )


def report(
    folder: str | PathLike[str],
    output: str | PathLike[str],
    *,
    reference: str | None = None,
    figures: str | PathLike[str] | None = None,
) -> Path:
    """Write one HTML page about all results files in a folder, as ``harness-rect report`` does.

    Args:
        folder: with results files of lm-eval, in subfolders too.
        output: the page, e.g. ``report.html``.
        reference: published numbers to set ours beside: ``"paper"``.
        figures: a folder for the figures as SVG and PNG.

    Returns:
        the path of the page.

    Raises:
        UserError: there are no results, or a file cannot be written.
    """
    from harness_rect.experiments.report.writing import write_report  # imports matplotlib

    page, chosen = _path(output, "report()"), None if figures is None else _path(figures, "report()")
    write_report(_path(folder, "report()"), page, reference, chosen)
    return page


def _path(given: object, where: str) -> Path:
    if not isinstance(given, str | PathLike):
        raise UserError(f"{where}: expected a path, found {type(given).__name__}")
    return Path(given)
