"""A hook of MkDocs: what the pages link to outside docs/ becomes part of the site, and links are those of the site's places.

So that a link is written once, as it is followed in a checkout.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\(|<img src=\")([^)\s\"#:]+)((?:#[^)\s\"]*)?(?:\)|\"))")
FIRST = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")


def place(path: str) -> str:
    """Where in the site a file of the checkout stands."""
    return path.removeprefix("docs/")


def targets(path: str) -> list[str]:
    """The files of the checkout to which a page links."""
    text = (ROOT / path).read_text("utf-8")
    found = [posixpath.normpath(posixpath.join(posixpath.dirname(path), target)) for _, target, _ in LINK.findall(text)]
    return [each for each in found if (ROOT / each).is_file()]


def on_files(files: Any, config: Any) -> Any:
    """Adds what is linked to and stands elsewhere."""
    from mkdocs.structure.files import File

    known = {f"docs/{file.src_uri}" for file in files}
    waiting = [*FIRST, *sorted(path for path in known if path.endswith(".md"))]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if path not in known:
            files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            more = [each for each in targets(path) if each not in seen]
            seen.update(more)
            waiting += more
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links from where the page stands in the site to where what it names does."""
    own = page.file.src_uri
    path = f"docs/{own}" if (ROOT / "docs" / own).is_file() else own

    def moved(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        named = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if not (ROOT / named).is_file():
            return found[0]
        return before + os.path.relpath(place(named), posixpath.dirname(own) or ".") + after

    return LINK.sub(moved, markdown)
