"""Second moments from a folder of the user, from the cache, or computed and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness_rect import embedded
from harness_rect.code_digest import code_digest
from harness_rect.errors import UserError
from harness_rect.fingerprint import computation_digest
from harness_rect.io.cache import cache_folder
from harness_rect.io.checksums import set_aside
from harness_rect.io.files import acquired
from harness_rect.io.resume import failing
from harness_rect.models import EditableLM
from harness_rect.moments.accumulate import accumulate
from harness_rect.moments.layout import file_name, find_moment, folder_name, read_moment, write_moment
from harness_rect.moments.second_moment import SecondMoment
from harness_rect.moments.text import DEFAULT_TOKENS, texts_of, windows
from harness_rect.processes import ALONE, Processes

log = logging.getLogger(__name__)

#: Modules that determine the second moments of a model and a text.
CODE = (
    "compat.transformers",
    "models",
    "moments.accumulate",
    "moments.running",
    "moments.text",
    "precision",
    "processes",
)


class MomentProvider:
    """Second moments of the unedited model for the layers of a run.

    Args:
        folder: the user's ``stats`` folder, or None for the cache. A layer that is missing in the folder is
            an error and not computed.
        model_name: as in the public layout's folder names.
        model_fingerprint: identifies the weights the moments are of.
        dataset, dtype, samples: ``mom2_dataset``, ``mom2_dtype``, ``mom2_n_samples``; the dataset may be a
            path to a text file.
        tokens: the number of tokens of the text to read, if moments are computed.

    Raises:
        UserError: there is no such folder.
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
        if self.folder is None:
            self._moments |= self._cached(layers)
        else:
            paths = {layer: self._find(self.folder, layer) for layer in layers}
            found = {layer: self._read(path) for layer, path in paths.items()}
            self._moments |= found
            known = {one.of_model for one in found.values()} - {None}
            if known - {self.model_fingerprint} and not embedded.is_embedded(self.model_name):
                log.warning(
                    "stats=%s: computed with other weights than this model's, or in another dtype",
                    self.folder,
                )
        for layer in layers:
            log.info("second moments of layer %d: %s", layer, self._moments[layer].origin)

    def get(self, layer: int) -> SecondMoment:
        """The second moment of a loaded layer."""
        return self._moments[layer]

    def hashes(self) -> dict[str, str]:
        """layer -> hash of the numbers used."""
        return {str(layer): moment.sha256 for layer, moment in sorted(self._moments.items())}

    def provenance(self) -> dict[str, object]:
        """layer -> file, tokens and hash of the numbers used, for the results file."""
        return {
            str(layer): {"file": moment.origin, "tokens": moment.count, "sha256": moment.sha256}
            for layer, moment in sorted(self._moments.items())
        }

    def paths_in(self, folder: Path, layers: Sequence[int]) -> dict[int, Path]:
        """layer -> the file for its moments, computed from ``tokens`` tokens, in a folder."""
        names = self.lm.architecture.down_projections
        return {layer: folder / file_name(names[layer], self.dtype, self.tokens) for layer in layers}

    def _find(self, folder: Path, layer: int) -> Path:
        module, stats = self.lm.architecture.down_projections[layer], f"{self.dataset}_stats"
        found = find_moment(folder, module, self.model_name, self.dataset, self.dtype, self.samples)
        if found is None:
            raise UserError(
                f"stats={folder}: no second moments of {module} (looked for"
                f" {file_name(module, self.dtype, self.samples)} in it, in {stats}/ and in"
                f" {folder_name(self.model_name)}/{stats}/); compute them with"
                f" `harness-rect stats --model M --layers {layer} --text FILE --output {folder}`"
            )
        return found

    def _read(self, path: Path) -> SecondMoment:
        return read_moment(path, self.lm.architecture.d_mlp)

    def _cached(self, layers: Sequence[int]) -> dict[int, SecondMoment]:
        """Layer -> its moments from the cache, computed if they are missing there or damaged."""
        key = hashlib.sha256(json.dumps(self._sample(), sort_keys=True).encode()).hexdigest()[:16]
        folder = cache_folder("stats") / key
        paths = self.paths_in(folder, layers)
        found = self._whole(paths)
        if len(found) == len(paths):
            return found
        lock = acquired(folder / ".lock")  # two runs on one machine compute once
        try:
            missing = {layer: path for layer, path in paths.items() if layer not in found}
            found |= self._whole(missing)
            if missing := {layer: path for layer, path in missing.items() if layer not in found}:
                found |= self.compute_into(missing, must=False)
        finally:
            lock.release()
        return found

    def _whole(self, paths: Mapping[int, Path]) -> dict[int, SecondMoment]:
        """Layer -> moments of the files that are there; damaged ones are set aside."""
        found: dict[int, SecondMoment] = {}
        for layer, path in paths.items():
            if path.exists():
                try:
                    found[layer] = self._read(path)
                except UserError as error:
                    set_aside(path, "the cached file", str(error).removeprefix(f"{path}: "))
        return found

    def _sample(self) -> dict[str, object]:
        """Everything that determines computed moments, except the layers."""
        path, encoder = Path(self.dataset), self.lm.encoder
        plain = encoder.tokenizer("a", add_special_tokens=False)["input_ids"]
        source = {"text": self.dataset}
        if path.is_file():
            source = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        return source | {
            "model": self.model_fingerprint,
            "computation": computation_digest(self.lm.model, encoder.tokenizer),
            "tokens": self.tokens,
            "special_tokens": encoder.tokens("a") != plain,
            "code": code_digest(CODE),
        }

    def compute_into(
        self, paths: Mapping[int, Path], processes: Processes = ALONE, must: bool = True
    ) -> dict[int, SecondMoment]:
        """Compute the moments of the given layers from text, and write each to its path.

        Several processes, all called alike, share the work; the main one writes and the others wait.

        Args:
            must: an error in writing is raised; else a warning says so.
        """
        layers = sorted(paths)
        log.info(
            "computing second moments of layers %s from %s (%d tokens)", layers, self.dataset, self.tokens
        )
        with processes.failing_together():
            sequences, documents = windows(self.lm, texts_of(self.dataset), self.tokens)
        fingerprint = json.dumps(self._sample() | {"layers": layers}, sort_keys=True)
        folder = paths[layers[0]].parent
        partial = folder / ".partial.safetensors"
        sums, count = accumulate(self.lm, layers, sequences, partial, fingerprint, processes, must)
        if self.dtype != "float64":
            sums = {layer: total.float() for layer, total in sums.items()}
        with processes.failing_together():
            if processes.is_main:
                for layer, path in paths.items():
                    with failing(must, f"{path}: the second moments"):
                        write_moment(path, sums[layer], count, documents, fingerprint)
                for unfinished in folder.glob(".partial.*safetensors"):  # by another number of processes
                    unfinished.unlink(missing_ok=True)
        return {layer: SecondMoment(sums[layer], count, str(path)) for layer, path in paths.items()}
