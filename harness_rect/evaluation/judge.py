"""An optional judge: a language model that says whether a generated answer means the expected one.

Exact match counts "He was born in Rome" as wrong where "Rome" is expected. The study that introduced
generated reliability (arXiv 2502.11177) therefore also lets a model grade the answers. Any endpoint with
OpenAI's chat completions will do: ``judge=http://localhost:8000/v1,judge_model=NAME`` in ``--model_args`` or
``--metadata``. It is off by default. The prompt is ours, so grades are not comparable with published ones.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from harness_rect.errors import UserError
from harness_rect.fingerprint import digest
from harness_rect.io.cache import cache_folder

log = logging.getLogger(__name__)

#: Environment variable with the endpoint's key, where it wants one.
KEY = "OPENAI_API_KEY"
SECONDS = 60
RETRIES = 5

PROMPT = """\
You grade answers. Decide whether the answer says the same as the expected answer to the question.
Names may be spelled differently, and a longer answer is fine as long as it does not contradict the expected \
one or itself. What you know yourself does not matter: the expected answer counts as true.

Question: {question}
Expected answer: {expected}
Answer: {answer}

Reply with one word: CORRECT or INCORRECT."""


class Judge:
    """Grades answers, and keeps each grade so that no answer is sent twice.

    Args:
        url: the base address, which ends before ``/chat/completions``.
        model: the name that the endpoint knows its model by.
        folder: where grades are kept; otherwise the user's cache.

    Raises:
        UserError: the endpoint cannot be reached or does not grade a trivial answer as correct.
    """

    def __init__(self, url: str, model: str, folder: Path | None = None) -> None:
        self.url, self.model = url.rstrip("/"), model
        folder = folder or cache_folder("judge")
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "grades.sqlite"
        with closing(self._open()) as kept:
            kept.execute("CREATE TABLE IF NOT EXISTS grades (question TEXT PRIMARY KEY, reply TEXT)")
        retry = Retry(
            total=RETRIES,
            backoff_factor=0.5,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=("POST",),
            raise_on_status=False,
        )
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retry))
        try:
            correct = read_grade(self.reply("What is the capital of France?", "Paris", "Paris"))
        except requests.RequestException as error:
            raise UserError(f"judge={url}: {_reason(error)}") from None
        if not correct:
            raise UserError(
                f"judge={url}: {model} does not grade a correct answer as CORRECT; give another judge_model"
            )

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Judge | None:
        """The judge that ``judge`` and ``judge_model`` name, None without ``judge``.

        Raises:
            UserError: one is given without the other, or see the class.
        """
        url, model = metadata.get("judge"), metadata.get("judge_model")
        if bool(url) != bool(model):
            given, missing = ("judge", "judge_model") if url else ("judge_model", "judge")
            raise UserError(
                f"{given}= is given without {missing}=: a judge has an address and a model's name"
            )
        return cls(str(url), str(model)) if url else None

    def reply_or_none(self, question: str, expected: str, answer: str) -> str | None:
        """:meth:`reply`; None, with a warning, where the endpoint gives none."""
        try:
            return self.reply(question, expected, answer)
        except requests.RequestException as error:
            log.warning("judge=%s: no grade for %r: %s", self.url, question, _reason(error))
            return None

    def reply(self, question: str, expected: str, answer: str) -> str:
        """What the model says of an answer, for :func:`read_grade`.

        Raises:
            requests.RequestException: the endpoint gave no reply.
        """
        text = PROMPT.format(question=question, expected=expected, answer=answer)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
        }
        key = digest({"url": self.url, **body})
        reply = self._kept(key)
        if reply is None:
            reply = self._ask(body)
            with closing(self._open()) as kept, kept:
                kept.execute("INSERT OR REPLACE INTO grades VALUES (?, ?)", (key, reply))
        return reply

    def _ask(self, body: dict[str, Any]) -> str:
        token = os.environ.get(KEY)
        response = self._session.post(
            f"{self.url}/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=SECONDS,
        )
        response.raise_for_status()
        try:
            return str(response.json()["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError):
            raise requests.RequestException("the reply is not a chat completion") from None

    def _kept(self, key: str) -> str | None:
        with closing(self._open()) as kept:
            found = kept.execute("SELECT reply FROM grades WHERE question = ?", (key,)).fetchone()
        return None if found is None else str(found[0])

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._file, timeout=SECONDS)


def read_grade(reply: str) -> bool | None:
    """The last grade in a reply, since models that reason aloud name both before they decide."""
    found = re.findall(r"\b(?:IN)?CORRECT\b", reply.upper())
    return found[-1] == "CORRECT" if found else None


def _reason(error: requests.RequestException) -> str:
    if error.response is not None:
        return f"answered with status {error.response.status_code} ({error.response.reason})"
    if isinstance(error, requests.ConnectionError):
        return "cannot be reached"
    return " ".join(str(error).split())[:160]
