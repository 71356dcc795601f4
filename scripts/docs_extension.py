"""For scripts/docs.sh: takes the mark [g] of group options out of argument names."""

import re
from typing import Any

import griffe


class GroupOptions(griffe.Extension):
    """`lr [g]: learning rate` becomes `lr: learning rate (a group may set its own)`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change an object's docstring."""
        if obj.docstring is not None:
            mark = re.compile(r"^( +\w+) \[g\]: (.)", re.MULTILINE)
            obj.docstring.value = mark.sub(r"\1: [g] \2", obj.docstring.value)
