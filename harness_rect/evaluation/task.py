"""The task class behind our YAML configs."""

from __future__ import annotations

from typing import Any

from harness_rect.compat.lm_eval import YamlTask


class RectTask(YamlTask):
    """lm-eval's YAML task, never served from its request cache.

    ``--cache_requests`` identifies a task by its name alone: requests built for one ``data`` folder or one
    list of edits would be taken for those of another, and scored against the wrong rows.
    """

    def build_all_requests(self, **kwargs: Any) -> None:
        super().build_all_requests(**kwargs | {"cache_requests": False})
