"""Public files, fetched on first use."""

from __future__ import annotations

from pathlib import Path

from harness_rect.errors import UserError


def download(url: str) -> Path:
    """A public file in the cache of ``datasets``; a cached one is found without any request.

    Only the download is left to ``datasets``: its JSON loader goes through Arrow, which gives all rows one
    schema.

    Raises:
        UserError: it is not in the cache and cannot be fetched.
    """
    from datasets import DownloadConfig, DownloadManager

    try:
        # Without the etag a cached file is found offline.
        return Path(DownloadManager(download_config=DownloadConfig(use_etag=False)).download(url))
    except Exception as error:  # what comes out depends on the HTTP stack below: aiohttp, httpx, OSError, ...
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(
            f"not in the cache and could not be downloaded ({reason}); download {url} by hand"
        ) from error
