"""What MkDocs does besides for the documentation site (mkdocs.yml).

Files of the repository get a page, and roles of Sphinx in docstrings (:meth:`run`) are read.

The pages of docs/ link to modules, configurations and model cards as they lie in the repository. On the site
such a link leads to a page with the file's text, so that it works without a network; a link to what does not
exist fails the build.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]*)(#[^)]*)?(?=\))")
#: Links of a page that is shown at another place.
RELATIVE = re.compile(r"\[([^]]*)\]\((?!https?:|#)[^)]*\)")
FENCED = re.compile(r"^(`{3,}).*?^\1`*$", flags=re.DOTALL | re.MULTILINE)
ROLE = re.compile(r":(?:meth|class|func|mod|data|attr|exc):(<code>)(~[\w.]*\.)?")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".csv": "text", ".txt": "text", ".json": "json"}
#: Larger files are cut: a table of all results is no reading.
LONGEST = 60_000


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each file of the repository that a page links to."""
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        text = FENCED.sub("", page.content_string)
        for link in LINK.finditer(text):
            source = _outside(page.src_uri, link[1])
            if source and not files.get_file_from_path(_page(source)):
                content = _content(source, page.src_uri)
                hidden = InclusionLevel.NOT_IN_NAV
                files.append(File.generated(config, _page(source), content=content, inclusion=hidden))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point the links at those pages."""
    here = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        source = _outside(page.file.src_uri, link[1])
        if not source:
            return link[0]
        return posixpath.relpath(_page(source), here or ".") + (link[2] or "")

    return LINK.sub(moved, markdown) if not page.file.src_uri.startswith("repository/") else markdown


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    return ROLE.sub(r"\1", html)


def _outside(page: str, link: str) -> str | None:
    """The path in the repository that a link leads to, where it leaves docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def _page(source: str) -> str:
    return f"repository/{source.removesuffix('.md')}.md"


def _content(source: str, linked_by: str) -> str:
    path = ROOT / source
    if path.is_dir():
        names = sorted(one.name for one in path.iterdir() if not one.name.startswith(("_", ".")))
        body = "\n".join(f"* `{name}`" for name in names)
    elif not path.is_file():
        raise PluginError(f"docs/{linked_by}: there is no {source}")
    else:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
            body = RELATIVE.sub(r"\1", body)
            body = re.sub(r"^\| \|", "| measure |", body, flags=re.MULTILINE)  # no header without a text
            return f"---\nsearch: {{exclude: true}}\n---\n{body}"
        if path.suffix == ".ipynb":
            body = "\n\n".join(map(_cell, json.loads(text)["cells"]))
            return f"---\nsearch: {{exclude: true}}\n---\n{body}"
        cut = "" if len(text) <= LONGEST else "\n\nThe beginning; the file is longer."
        body = f"````{LANGUAGES.get(path.suffix, 'text')}\n{text[:LONGEST].rstrip()}\n````{cut}"
    return f"---\nsearch: {{exclude: true}}\ntitle: {source}\n---\n# `{source}`\n\n{body}\n"


def _cell(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    return RELATIVE.sub(r"\1", text) if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
