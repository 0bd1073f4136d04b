"""Links the functions in the table of algorithm.md to their documentation and source."""

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

_FUNCTION = re.compile(r"(algorithm|execution)/(\w+)\.py: ([\w.]+)")


class LinkFunctions(SphinxTransform):
    default_priority = 6  # before Sphinx resolves links

    def apply(self, **kwargs: Any) -> None:
        for node in list(self.document.findall(nodes.literal)):
            if found := _FUNCTION.fullmatch(node.astext()):
                folder, file, function = found.groups()
                link = addnodes.pending_xref(
                    "",
                    refdomain="py",
                    reftype="obj",
                    reftarget=f"loft_jax.{folder}.{file}.{function}",
                    refdoc=self.env.docname,
                    refwarn=not function.split(".")[-1].startswith("_"),
                )
                node.replace_self(link)
                link += node


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_transform(LinkFunctions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
