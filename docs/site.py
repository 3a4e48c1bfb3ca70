"""Makes pages of the site of files outside of this folder: README.md, other documents, and whatever pages link to.

A hook of mkdocs, named in mkdocs.yml. Links in the documents lead from file to file, as they do in the repository, and
in the site to the pages that are made of those files.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
#: Documents beside the folder that are pages of the site, under other addresses.
DOCUMENTS = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
BADGE = re.compile(r"^\[!\[.*\n", re.MULTILINE)
ROLE = re.compile(r":(?:attr|class|data|func|meth):(?=<code>)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents, and a page for each file that any page links to."""
    sources: set[str] = set()
    for document, page in DOCUMENTS.items():
        text = BADGE.sub("", (ROOT / document).read_text())
        files.append(File.generated(config, page, content=LINK.sub(_link_to_page(document, sources), text)))
    for file in files.documentation_pages():
        if file.abs_src_path is not None:
            LINK.sub(_link_to_page(f"docs/{file.src_uri}", sources), Path(file.abs_src_path).read_text())
    for source in sorted(sources):
        files.append(File.generated(config, _page_of(source), content=_show(source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have a page's links to files outside of the folder lead to their pages."""
    is_here = page.file.abs_src_path is not None
    return LINK.sub(_link_to_page(f"docs/{page.file.src_uri}", set()), markdown) if is_here else markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave out what Sphinx would make of a docstring's roles."""
    return ROLE.sub("", html)


def _link_to_page(document: str, sources: set[str]) -> Callable[[re.Match[str]], str]:
    """Turns a link of a document into one of its page; adds to ``sources`` the files that pages have to be made of."""

    def link_to_page(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(document), link[1]))
        if target.startswith("docs/"):
            page = target.removeprefix("docs/")
        elif (ROOT / target).is_file():
            page = _page_of(target)
            if target not in DOCUMENTS:
                sources.add(target)
        else:
            return link[1]  # mkdocs says that there is no such page
        here = DOCUMENTS.get(document, document.removeprefix("docs/"))
        return posixpath.relpath(page, posixpath.dirname(here) or ".")

    return link_to_page


def _page_of(file: str) -> str:
    return DOCUMENTS.get(file, f"files/{file}.md")


def _show(file: str) -> str:
    text = (ROOT / file).read_text()
    return f"# {file}\n\n`````{LANGUAGES.get(Path(file).suffix, 'text')}\n{text}\n`````\n"
