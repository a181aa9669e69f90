"""``python -m harness_rect.cli``: the ``harness-rect`` command."""

from harness_rect.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
