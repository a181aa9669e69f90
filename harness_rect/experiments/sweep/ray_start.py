"""Ray for a sweep: the cluster that is there, or one that is started on this machine.

Imports nothing heavy: starting Ray is mostly waiting, and the rest of the program is imported meanwhile.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from harness_rect.errors import UserError
from harness_rect.io.progress import logging_only

#: What runs a sweep, and takes as long to import as Ray to start.
REST = "harness_rect.experiments.sweep.runner"
#: Bytes of shared memory of a Ray that is started here; what goes through it is small.
OBJECTS = 200 * 2**20
#: Environment variables that workers on other machines get from the driver.
PASSED_ON = (
    "HARNESS_RECT_",
    "HF_HOME",
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_",
    "TRANSFORMERS_OFFLINE",
)
#: Environment variables of all workers: their progress bars would go nowhere.
OF_WORKERS = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def ray_running() -> Iterator[Any]:
    """Ray, connected to the cluster of RAY_ADDRESS or the one that runs here, else started here.

    Within another such block it is the Ray of that one.

    Raises:
        UserError: Ray is not installed, or there is no cluster at RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--backend ray needs Ray ({error}): pip install 'harness-rect[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    # Ray's processes end with the thread that starts them: it is the imports that get another one.
    imports = threading.Thread(target=_import_rest, daemon=True)
    imports.start()
    try:
        with logging_only(logging.ERROR, "ray"):
            _start(ray)
        imports.join()  # transformers cannot be imported by two threads at once
        yield ray
    finally:
        ray.shutdown()
        if imports.is_alive():
            logging.disable(logging.INFO)  # interrupted: half of torch says more when the program ends


def _import_rest() -> None:
    with suppress(Exception):  # the main thread imports it too, and says what is wrong
        importlib.import_module(REST)


def _start(ray: Any) -> None:
    common: dict[str, Any] = {
        "log_to_driver": False,  # what workers have to say comes through the inbox
        "logging_level": logging.ERROR,
    }
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address != "local":
            passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
            ray.init(address="auto", runtime_env={"env_vars": passed | OF_WORKERS}, **common)
            return
    except ConnectionError as error:
        if address:
            raise UserError(f"RAY_ADDRESS={address}: no Ray cluster there: {error}") from None
    # Workers on this machine inherit the environment. One with an environment of its own would have to wait
    # for Ray's agent; without one, Ray starts it ahead.
    before = {name: os.environ.get(name) for name in OF_WORKERS}
    os.environ.update(OF_WORKERS)
    try:
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECTS, **common)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
