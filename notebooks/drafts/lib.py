import os, nbformat
from pathlib import Path
ROOT = Path(os.environ["NBROOT"])
class Book:
    def __init__(self, name):
        self.path = ROOT / name; self.nb = nbformat.read(self.path, 4)
    def at(self, start, kind=None):
        """The one cell whose source begins so or holds it."""
        found = [c for c in self.nb.cells if start in c.source and (kind is None or c.cell_type == kind)]
        assert len(found) == 1, (start, len(found))
        return found[0]
    def set(self, start, text, volatile=None, kind=None):
        c = self.at(start, kind); c.source = text.strip("\n"); self._v(c, volatile)
    def sub(self, start, old, new, volatile=None, kind=None):
        c = self.at(start, kind); assert old in c.source, (start, old); c.source = c.source.replace(old, new); self._v(c, volatile)
    def _v(self, c, volatile):
        if volatile is True: c.metadata["tags"] = ["volatile"]
        if volatile is False: c.metadata.pop("tags", None)
    def drop(self, start): self.nb.cells.remove(self.at(start))
    def after(self, start, kind, text, volatile=False):
        k = self.nb.cells.index(self.at(start))
        new = nbformat.v4.new_code_cell(text.strip("\n")) if kind == "code" else nbformat.v4.new_markdown_cell(text.strip("\n"))
        if volatile: new.metadata["tags"] = ["volatile"]
        self.nb.cells.insert(k + 1, new)
    def save(self): nbformat.write(self.nb, self.path)
