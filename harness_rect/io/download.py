"""Public files, fetched on first use."""

from __future__ import annotations

from pathlib import Path

from harness_rect.errors import UserError

#: Where files of data sets on the hub begin; the rest is owner/name/resolve/revision/file.
HUB = "https://huggingface.co/datasets/"


def download(url: str) -> Path:
    """A public file in the cache of ``datasets`` or of the hub; a cached one is found without any request.

    Only the download is left to ``datasets``: its JSON loader goes through Arrow, which gives all rows one
    schema. For files of the hub it would ask for their revision even where they are cached.

    Raises:
        UserError: it is not in the cache and cannot be fetched.
    """
    from datasets import DownloadConfig, DownloadManager
    from huggingface_hub import hf_hub_download

    try:
        if url.startswith(HUB):
            owner, name, _, revision, file = url.removeprefix(HUB).split("/", 4)
            found: str = hf_hub_download(f"{owner}/{name}", file, repo_type="dataset", revision=revision)
            return Path(found)
        # Without the etag a cached file is found offline.
        return Path(DownloadManager(download_config=DownloadConfig(use_etag=False)).download(url))
    except Exception as error:  # what comes out depends on the HTTP stack below: aiohttp, httpx, OSError, ...
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(
            f"not in the cache and could not be downloaded ({reason}); download {url} by hand"
        ) from error
