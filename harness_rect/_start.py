"""What Python calls at its start where it reads .start files (PEP 829), instead of the line of the .pth."""

import sys


class HarnessRect:
    """Finds no modules itself: loads :mod:`harness_rect._autoload` when ``lm_eval`` is imported."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "lm_eval":
            try:
                import harness_rect._autoload  # noqa: F401
            except Exception:  # lm-eval goes on without us
                pass


def wait_for_lm_eval() -> None:
    if not any(getattr(finder, "__name__", "") == "HarnessRect" for finder in sys.meta_path):
        sys.meta_path.insert(0, HarnessRect)
