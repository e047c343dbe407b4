"""The images of a source at a URL whose rows are known: it is not opened again, since listing it may take minutes."""

from boomgen import places
from boomgen.sources import folder, wds
from boomgen.sources.base import NO_SPLIT, Row


class Planned:
    """Reads rows by what they say of themselves; `split` is the one that was chosen when they were listed."""

    def __init__(self, location: str, split: str) -> None:
        self._place = places.place(location)
        self._images = self._place if split == NO_SPLIT else self._place / split

    def read(self, row: Row) -> bytes:
        """The image as it is stored; one request."""
        if not row.path.endswith(".tar"):
            return folder.read(self._images, row)
        return wds.read(self._place.parent if row.path == self._place.name else self._place, row)
