"""The public edit sets: where their files are, and the download."""

from __future__ import annotations

from pathlib import Path

from harness_rect.errors import UserError
from harness_rect.io import download as downloads

_ROME = "https://rome.baulab.info/data/dsets"
_KNOWEDIT = "https://huggingface.co/datasets/zjunlp/KnowEdit/resolve/main/benchmark"
_RIPPLE_EDITS = (
    "https://github.com/edenbiran/RippleEdits/raw/main/data/benchmark"  # also where git-lfs has them
)
_MQUAKE = "https://raw.githubusercontent.com/princeton-nlp/MQuAKE/main/datasets"
#: The commit that has the file; 1000 of the 19249 rows that its authors published on the hub later.
_QAEDIT = (
    "https://raw.githubusercontent.com/WanliYoung/Revisit-Editing-Evaluation"
    "/d6025e0ee9731d3b59b84ea242dc06bf0e0c8a74/data"
)
URLS = {
    "zsre": f"{_ROME}/zsre_mend_eval.json",
    "zsre_train": f"{_ROME}/zsre_mend_train.json",
    "counterfact": f"{_ROME}/counterfact.json",
    "qaedit": f"{_QAEDIT}/QAEdit_inter_1k.json",
    "knowedit": f"{_KNOWEDIT}/wiki_counterfact/test_cf.json",
    "knowedit_recent": f"{_KNOWEDIT}/wiki_recent/recent_test.json",
    "knowedit_zsre": f"{_KNOWEDIT}/ZsRE/ZsRE-test-all.json",
    "knowedit_wikibio": f"{_KNOWEDIT}/WikiBio/wikibio-test-all.json",
    "rippleedits": f"{_RIPPLE_EDITS}/popular.json",
    "rippleedits_random": f"{_RIPPLE_EDITS}/random.json",
    "rippleedits_recent": f"{_RIPPLE_EDITS}/recent.json",
    "mquake": f"{_MQUAKE}/MQuAKE-CF-3k-v2.json",
    "mquake_t": f"{_MQUAKE}/MQuAKE-T.json",
}


def download(name: str) -> Path:
    """The public file, fetched on first use."""
    try:
        return downloads.download(URLS[name])
    except UserError as error:
        raise UserError(f"edits={name}: {error} and give the file: edits=PATH") from error
