"""What consistency is measured with (ROME): snippets about targets, and frequencies of words.

The authors' three files are read from a ``data`` folder or, with ``data=hub``, downloaded once:
``attribute_snippets.json`` (texts by relation and target), ``idf.npy`` and ``tfidf_vocab.json`` (inverse
document frequencies of words, and each word's index in them).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness_rect.errors import UserError
from harness_rect.evaluation.data import data_choice, file_in, folder_of
from harness_rect.io.download import download
from harness_rect.io.rows import parse_json, read_text

log = logging.getLogger(__name__)

URL = "https://rome.baulab.info/data/dsets/"
SNIPPETS, FREQUENCIES, VOCABULARY = "attribute_snippets.json", "idf.npy", "tfidf_vocab.json"


class References:
    """Texts by relation and target, and TF-IDF similarity of two texts.

    Args:
        snippets: (relation, target id) -> texts.
        vectorizer: scikit-learn's, with its words and their frequencies set; None without them.
    """

    def __init__(self, snippets: Mapping[tuple[str, str], Sequence[str]], vectorizer: Any = None) -> None:
        self._snippets, self._vectorizer = snippets, vectorizer

    @classmethod
    def find(cls, metadata: Mapping[str, Any]) -> References:
        """The files that the task's ``data`` names; what is not there leaves consistency out.

        Raises:
            UserError: a file is there and cannot be read.
        """
        files = {name: _find(name, metadata) for name in (SNIPPETS, FREQUENCIES, VOCABULARY)}
        snippets, frequencies, vocabulary = files.values()
        texts = {} if snippets is None else _read_snippets(snippets)
        if frequencies is None or vocabulary is None:
            return cls(texts)
        return cls(texts, _vectorizer(frequencies, vocabulary))

    @property
    def comparable(self) -> bool:
        """Whether there are word frequencies."""
        return self._vectorizer is not None

    def texts(self, relation: str, target_id: str) -> Sequence[str]:
        return self._snippets.get((relation, target_id), ())

    def similarity(self, text: str, other: str) -> float:
        """Cosine of the TF-IDF vectors, in [0, 1]; 0 where one has no known word."""
        first, second = self._vectorizer.transform([text, other])
        return float((first @ second.T).sum())


def _find(name: str, metadata: Mapping[str, Any]) -> Path | None:
    folder = folder_of(data_choice(metadata))
    if folder is not None:
        return file_in(folder, name)
    try:
        return download(URL + name)
    except UserError as error:
        log.warning("rect_fluency: no consistency: %s", error)
        return None


def _read_snippets(path: Path) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    try:
        for row in parse_json(read_text(path), str(path)):
            texts = [sample["text"] for sample in row["samples"]]
            found.setdefault((row["relation_id"], row["target_id"]), []).extend(texts)
    except (KeyError, TypeError):
        raise UserError(
            f"{path}: expected a list of objects with relation_id, target_id and samples, a list of objects"
            " with text"
        ) from None
    return found


def _vectorizer(frequencies: Path, vocabulary: Path) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = parse_json(read_text(vocabulary), str(vocabulary))
    try:
        idf = np.load(frequencies, allow_pickle=False)
        indices = sorted(words.values())
        if idf.shape != (len(words),) or indices != list(range(len(words))) or not np.isfinite(idf).all():
            raise ValueError
        vectorizer = TfidfVectorizer(vocabulary=words)
        vectorizer.idf_ = idf
    except (AttributeError, OSError, TypeError, ValueError):
        raise UserError(
            f"{frequencies} and {vocabulary}: expected one finite number for each of the vocabulary's words,"
            " which are numbered from 0"
        ) from None
    return vectorizer
