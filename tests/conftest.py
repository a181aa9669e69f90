"""What every test gets: no network, one thread, a cache folder of its own, tiny tokenizers and models."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Before anything imports huggingface_hub, datasets or tokenizers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
_CACHE = tempfile.mkdtemp(prefix="harness-rect-tests-")
os.environ["HARNESS_RECT_CACHE"] = _CACHE
# `import tiny_models` works in every test module, whatever folder it lies in.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest  # noqa: E402


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


class _FullRuns(logging.Handler):
    """Collects the warnings that a model is searched by full runs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        from harness_rect.models.forward import FULL_RUN_WARNING

        if record.msg == FULL_RUN_WARNING:
            self.seen.append(record.getMessage())


def pytest_runtest_setup(item: pytest.Item) -> None:
    if os.name != "posix" and item.get_closest_marker("posix"):
        pytest.skip("needs signals, forks or FIFOs")


@pytest.fixture(autouse=True)
def no_full_runs(request):
    """A test fails where a search falls back to full runs, unless it is marked ``full_runs``."""
    handler, logger = _FullRuns(), logging.getLogger("harness_rect")
    # The model class may have given our logger lm-eval's handlers, in an earlier test or a module's fixture.
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    if handler.seen and not request.node.get_closest_marker("full_runs"):
        pytest.fail(f"{handler.seen[0]}: several times the cost")


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer that adds nothing to a text (as GPT-2's)."""
    from support.tiny_models import train_tokenizer

    return train_tokenizer(bos=False)


@pytest.fixture(scope="session")
def bos_tokenizer():
    """The same vocabulary, with BOS before every text (as Llama's)."""
    from support.tiny_models import train_tokenizer

    return train_tokenizer(bos=True)


@pytest.fixture(scope="session")
def make_model():
    """``make_model(family, seed=0, **config)``: a random 2-layer model of ``tiny_models.FAMILIES``."""
    from support.tiny_models import make_model

    return make_model


@pytest.fixture
def make_lm(make_model, tokenizer, bos_tokenizer):
    """``make_lm(family, bos=..., **config)``: an EditableLM; by default BOS as the family's tokenizers do."""
    from support.tiny_models import FAMILIES

    from harness_rect.models import EditableLM

    def make(family: str, bos: bool | None = None, **config):
        with_bos = FAMILIES[family].bos if bos is None else bos
        return EditableLM(make_model(family, **config), bos_tokenizer if with_bos else tokenizer)

    return make
