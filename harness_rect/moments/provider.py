"""Where second moments come from: a folder the user gives, our cache, or a computation that fills it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from harness_rect.code_digest import code_digest
from harness_rect.errors import UserError
from harness_rect.io.cache import cache_folder
from harness_rect.models import EditableLM
from harness_rect.moments.collect import DEFAULT_TOKENS, collect, texts_of, windows
from harness_rect.moments.second_moment import SecondMoment, read_moment, write_moment
from harness_rect.processes import ALONE, Processes

log = logging.getLogger(__name__)


def layout_name(model: str) -> str:
    """What the public layout calls a model: its hub name, or the last part of a local path."""
    return Path(model).name if Path(model).is_dir() else model


def model_folder_name(name: str) -> str:
    """How the public layout spells a model's name as a folder: slashes become underscores."""
    return name.replace("/", "_")


def find_moment(
    folder: Path, module: str, model_name: str, dataset: str, dtype: str, samples: int
) -> Path | None:
    """The file of one module under a user's folder, most exact match first.

    Looked for in ``<folder>/<model>/<dataset>_stats/``, ``<folder>/<dataset>_stats/`` and ``<folder>/``; a
    file of another sample size or dtype serves where there is exactly one.

    Raises:
        UserError: if several files fit equally well.
    """
    # The public cache knows a model by its name alone ("gpt2-xl"), the hub also by its owner.
    models = [model_folder_name(model_name), model_name.rpartition("/")[2]]
    stats = f"{dataset}_stats"
    places = [*(folder / name / stats for name in models if name), folder / stats, folder]
    for place in places:
        exact = place / f"{module}_{dtype}_mom2_{samples}.npz"
        if exact.is_file():
            return exact
    pattern = re.compile(re.escape(module) + r"_(float32|float64)_mom2_\d+\.npz")
    for place in places:
        found = sorted(p for p in place.glob("*.npz") if pattern.fullmatch(p.name)) if place.is_dir() else []
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise UserError(
                f"{place}: several files of second moments for {module}: {names}; set mom2_n_samples"
            )
        if found:
            return found[0]
    return None


class MomentProvider:
    """Second moments of the layers a run needs, of the unedited model.

    Args:
        folder: the user's ``stats`` folder, or None for the cache only.
        model_name: as in the public layout's folder names.
        model_fingerprint: identifies the weights the moments are of.
        dataset, dtype, samples: ``mom2_dataset``, ``mom2_dtype``, ``mom2_n_samples``; the dataset may be a
            path to a text file.

    A user's folder that lacks a layer is an error: a typo must not start a long computation.
    """

    def __init__(
        self,
        lm: EditableLM,
        folder: str | None,
        model_name: str,
        model_fingerprint: str,
        dataset: str = "wikipedia",
        dtype: str = "float32",
        samples: int = 100_000,
        tokens: int = DEFAULT_TOKENS,
    ) -> None:
        self.lm = lm
        self.folder = None if folder is None else Path(folder)
        self.model_name, self.model_fingerprint = model_name, model_fingerprint
        self.dataset, self.dtype, self.samples, self.tokens = dataset, dtype, samples, tokens
        self._moments: dict[int, SecondMoment] = {}
        if self.folder is not None and not self.folder.is_dir():
            raise UserError(f"stats={folder}: no such folder")

    def load(self, layers: Sequence[int]) -> None:
        """Find or compute the moments of all ``layers`` at once. Must be called before any edit."""
        missing = []
        for layer in layers:
            path = self._find(layer)
            if path is None:
                missing.append(layer)
            else:
                self._moments[layer] = read_moment(path, self.lm.architecture.d_mlp)
                log.info("second moments of layer %d: %s", layer, path)
        if missing:
            for layer, path in self._compute(missing).items():
                self._moments[layer] = read_moment(path, self.lm.architecture.d_mlp)

    def get(self, layer: int) -> SecondMoment:
        """The second moment of a loaded layer."""
        return self._moments[layer]

    def hashes(self) -> dict[str, str]:
        """layer -> hash of the numbers used."""
        return {str(layer): moment.sha256 for layer, moment in sorted(self._moments.items())}

    def provenance(self) -> dict[str, object]:
        """For the results file: layer -> origin, tokens and a hash of the numbers used."""
        return {
            str(layer): {
                "file": moment.origin,
                "tokens": moment.count,
                "sha256": moment.sha256,
            }
            for layer, moment in sorted(self._moments.items())
        }

    def _find(self, layer: int) -> Path | None:
        module = self.lm.architecture.down_projections[layer]
        if self.folder is None:
            path = self._cache_path(module)
            return path if path.is_file() else None
        found = find_moment(self.folder, module, self.model_name, self.dataset, self.dtype, self.samples)
        if found is None:
            raise UserError(
                f"stats={self.folder}: no second moments of {module} (looked for"
                f" {module}_{self.dtype}_mom2_{self.samples}.npz in it, in {self.dataset}_stats/ and in"
                f" {model_folder_name(self.model_name)}/{self.dataset}_stats/); make them with"
                f" `harness-rect stats --model M --layers {layer} --text FILE --output {self.folder}`"
            )
        return found

    def _sample(self) -> dict[str, object]:
        """What identifies a computed sample."""
        source: dict[str, object] = {"text": self.dataset}
        path = Path(self.dataset)
        if path.is_file():
            source = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        special = (
            self.lm.encoder.ids("a") != self.lm.encoder.tokenizer("a", add_special_tokens=False)["input_ids"]
        )
        return {
            "model": self.model_fingerprint,
            "tokens": self.tokens,
            "special_tokens": special,
            "code": code_digest(collect),
            **source,
        }

    def _cache_path(self, module: str) -> Path:
        key = hashlib.sha256(json.dumps(self._sample(), sort_keys=True).encode()).hexdigest()[:16]
        return cache_folder("stats") / key / f"{module}_{self.dtype}_mom2_{self.tokens}.npz"

    def _compute(self, layers: Sequence[int]) -> dict[int, Path]:
        names = {layer: self.lm.architecture.down_projections[layer] for layer in layers}
        paths = {layer: self._cache_path(name) for layer, name in names.items()}
        folder = next(iter(paths.values())).parent
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # two runs on one machine compute once
            wanted = [layer for layer in layers if not paths[layer].is_file()]
            if wanted:
                self.compute_into({layer: paths[layer] for layer in wanted})
        return paths

    def compute_into(self, paths: dict[int, Path], processes: Processes = ALONE) -> int:
        """Compute the moments of the given layers from text and write each to its path; returns tokens.

        Several processes, all called alike, share the work; the main one writes and the others wait.
        """
        log.info(
            "computing second moments of layers %s from %s (%d tokens)",
            sorted(paths),
            self.dataset,
            self.tokens,
        )
        with processes.agreed():
            sequences, documents = windows(self.lm, texts_of(self.dataset), self.tokens)
        fingerprint = json.dumps(self._sample() | {"layers": sorted(paths)}, sort_keys=True)
        folder = next(iter(paths.values())).parent
        sums, count = collect(
            self.lm, sorted(paths), sequences, folder / ".partial.safetensors", fingerprint, processes
        )
        with processes.agreed():
            if processes.is_main:
                for layer, path in paths.items():
                    total = sums[layer] if self.dtype == "float64" else sums[layer].float()
                    write_moment(path, total, count, documents, fingerprint)
                for unfinished in folder.glob(".partial.*safetensors"):  # by another number of processes
                    unfinished.unlink(missing_ok=True)
        return count
