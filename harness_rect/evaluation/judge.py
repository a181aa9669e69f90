"""An optional judge: a language model that says whether a generated answer means the expected one.

Exact match counts "He was born in Rome" as wrong where "Rome" is expected. The study that introduced
generated reliability (arXiv 2502.11177) therefore also lets a model grade the answers. Any endpoint with
OpenAI's chat completions will do: ``judge=http://localhost:8000/v1,judge_model=NAME`` in ``--model_args`` or
``--metadata``. It is off by default. The prompt is ours, so grades are not comparable with published ones.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from harness_rect.errors import UserError, one_line
from harness_rect.fingerprint import digest
from harness_rect.io.cache import cache_folder
from harness_rect.io.checksums import set_aside

log = logging.getLogger(__name__)

#: Environment variable with the endpoint's key, where it wants one.
KEY = "OPENAI_API_KEY"
#: That an endpoint may be silent, and that a question may take with all retries.
SECONDS, ALL_SECONDS = 60, 180
RETRIES = 5
#: No reply is larger, in bytes.
LARGEST = 2**20

TABLE = "CREATE TABLE IF NOT EXISTS grades (question TEXT PRIMARY KEY, reply TEXT)"

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
        self._keeps = True
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
        if found := self._kept("SELECT reply FROM grades WHERE question = ?", key):
            return str(found[0])
        reply = self._ask(body)
        self._kept("INSERT OR REPLACE INTO grades VALUES (?, ?)", key, reply)
        return reply

    def _ask(self, body: dict[str, Any]) -> str:
        """The reply, within :data:`ALL_SECONDS`: a timeout of requests holds for each read alone."""
        future: Future[str] = Future()

        def ask() -> None:
            try:
                future.set_result(self._post(body))
            except Exception as error:
                future.set_exception(error)

        Thread(target=ask, daemon=True).start()
        try:
            return future.result(ALL_SECONDS)
        except NotDone:
            raise requests.Timeout(f"no whole reply within {ALL_SECONDS} seconds") from None

    def _post(self, body: dict[str, Any]) -> str:
        token = os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url, content = f"{self.url}/chat/completions", b""
        with self._session.post(
            url, json=body, headers=headers, timeout=SECONDS, stream=True, allow_redirects=False
        ) as response:
            if response.status_code != 200:
                raise requests.HTTPError(response=response)
            for block in response.iter_content(2**16):
                content += block
                if len(content) > LARGEST:
                    raise requests.RequestException(f"the reply is larger than {LARGEST} bytes")
        try:
            reply = str(json.loads(content)["choices"][0]["message"]["content"] or "")
            reply.encode()  # a lone surrogate is no text that can be kept
        except (ValueError, LookupError, TypeError, RecursionError):
            raise requests.RequestException("the reply is not a chat completion") from None
        return reply

    def _kept(self, statement: str, *values: str) -> tuple[Any, ...] | None:
        """The first row of a statement on the grades; None, with a warning, where they cannot be used."""
        try:
            if self._keeps:
                with closing(sqlite3.connect(self._file, timeout=SECONDS)) as kept, kept:
                    kept.execute(TABLE)
                    row: tuple[Any, ...] | None = kept.execute(statement, values).fetchone()
                    return row
        except sqlite3.OperationalError as error:  # a full disk, a folder that may not be written
            self._keeps = False
            log.warning("judge=%s: grades are not kept in %s: %s", self.url, self._file, error)
        except sqlite3.DatabaseError as error:
            set_aside(self._file, "a judge's file of grades", error)
        return None


def read_grade(reply: str) -> bool | None:
    """The last grade in a reply, since models that reason aloud name both before they decide."""
    found = re.findall(r"\b(?:IN)?CORRECT\b", reply.upper())
    return found[-1] == "CORRECT" if found else None


def _reason(error: requests.RequestException) -> str:
    text = " ".join(str(error).split())
    if error.response is not None:
        text = f"answered with status {error.response.status_code} ({error.response.reason})"
    elif isinstance(error, requests.ConnectionError):
        text = "cannot be reached"
    return one_line(text)[:160]
