"""Resolves links from pages to files of the repository that are not pages of the site.

The pages are also read in the repository, where ``[cost.py](../benchmarks/cost.py)`` opens the
file. In the site such a link downloads the file, and a link to a folder becomes plain text. A link
to a file that does not exist is a warning, which fails the build.
"""

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[2]
# Pages of the site that are files outside of docs/.
PAGES = {"CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog", "README.md": "index"}
logger = logging.getLogger(__name__)


class ResolveRepositoryFiles(SphinxTransform):
    default_priority = 5  # before MyST and Sphinx resolve links

    def apply(self, **kwargs: Any) -> None:
        page = Path(self.env.doc2path(self.env.docname))
        for node in list(self.document.findall(_is_link)):
            target = node.get("refuri") or node.get("reftarget") or ""
            path, _, anchor = target.partition("#")
            if not path.startswith("..") and not isinstance(node, addnodes.download_reference):
                continue
            file = (page.parent / path).resolve()
            if not file.is_relative_to(ROOT) or file.is_relative_to(ROOT / "docs"):
                continue
            name = str(file.relative_to(ROOT))
            if name in PAGES:
                node.replace_self(self._page(node, PAGES[name], anchor))
            elif file.is_dir():
                node.replace_self(list(node.children))
            elif not file.exists():
                logger.warning("no such file: %s", target, location=node)

    def _page(self, node: nodes.Element, page: str, anchor: str) -> nodes.Element:
        target = f"/{page}" + (f"#{anchor}" if anchor else "")
        new = addnodes.pending_xref(
            "",
            refdomain="std",
            reftype="doc",
            reftarget=f"/{page}",
            refdoc=self.env.docname,
            refexplicit=True,
            refwarn=True,
        )
        del target
        new += [child.deepcopy() for child in node.children]
        return new


def _is_link(node: nodes.Node) -> bool:
    return isinstance(node, nodes.reference | addnodes.pending_xref | addnodes.download_reference)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_transform(ResolveRepositoryFiles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
