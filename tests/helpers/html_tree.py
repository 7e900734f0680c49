"""A page as a reader of it sees it: elements with their attributes and texts, by Python's own parser."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"input", "meta", "link", "line", "rect", "circle", "polyline"}  # in our templates; SVG's close themselves


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    texts: list[str] = field(default_factory=list)  # of it and all below

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    @property
    def cells(self) -> str:
        """The texts with a space between any two."""
        return " ".join(" ".join(self.texts).split())


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self.open: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1].tag == tag, (
            f"</{tag}> closes {self.open[-1].tag if self.open else 'nothing'}"
        )
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.texts.append(data)


def elements(html: str) -> list[Element]:
    """All elements in their order; fails where one is not closed, or closed by another."""
    tree = _Tree()
    tree.feed(html)
    tree.close()
    assert tree.open == [], f"not closed: {[element.tag for element in tree.open]}"
    return tree.elements


def check_harmless(html: str, scripts: int) -> list[Element]:
    """Nothing in a page runs but its own `scripts`, and nothing is loaded; its elements."""
    found = elements(html)
    assert sum(element.tag == "script" for element in found) == scripts
    assert not {"img", "iframe", "object", "embed", "link", "base", "a"} & {e.tag for e in found}
    for element in found:
        dangerous = [n for n in element.attributes if n.startswith("on") or n in ("src", "href", "style", "srcdoc")]
        assert dangerous == [], f"{element.tag} has {dangerous}"
    return found
