"""Build hook for editable installs: gives them a path entry that holds `harness_rect` and nothing else.

The project root as a path entry would make `tests`, `tasks`, `model_wrappers` and `benchmarks` importable
as well, everywhere. So an editable install points at `.editable/`, whose only content is a link to the
package.
"""

from __future__ import annotations

import os
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EditableLink(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            return
        link = os.path.join(self.root, ".editable", "harness_rect")
        os.makedirs(os.path.dirname(link), exist_ok=True)
        if not os.path.lexists(link):
            os.symlink(os.path.join("..", "harness_rect"), link, target_is_directory=True)
