"""The task class behind our YAML configs."""

from __future__ import annotations

from typing import Any

from lm_eval.api.task import ConfigurableTask


class RectTask(ConfigurableTask):
    """lm-eval's YAML task, never served from its request cache.

    ``--cache_requests`` knows a task by its name alone: requests built for one ``data`` folder or one list of
    edits would be taken for another, and scored against the wrong rows.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def build_all_requests(self, **kwargs: Any) -> None:
        super().build_all_requests(**kwargs | {"cache_requests": False})
