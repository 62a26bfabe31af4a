"""Reading whole records: past the page cache where the file system can, and checked."""

from __future__ import annotations

import errno
import logging

from moepack_formats import RECORD_ALIGN, osio
from moepack_formats.errors import ResourceError
from moepack_formats.layer import RecordLocation
from moepack_formats.pack import Pack, check_record

_log = logging.getLogger(__name__)


class RecordReader:
    """Reads records; called by several threads at once.

    A direct read costs a fifth of the processor time of one through the page cache, and leaves the
    memory that a budget does not cover to the program's own code.

    Args:
        pack: An open pack. Its descriptors are switched to direct reads.
        direct: Whether to try. Where it is refused, reads go through the page cache.

    Attributes:
        direct: Whether reads are direct.
    """

    def __init__(self, pack: Pack, *, direct: bool) -> None:
        self._descriptors = {at.descriptor: at.file for layer in pack.layers for at in layer}
        self.direct = direct
        for descriptor, file in self._descriptors.items():
            with osio.io_errors(file):
                if not osio.set_direct(descriptor, self.direct) and self.direct:
                    self._give_up(file)

    def read(self, at: RecordLocation, buffer: memoryview, layer: int, expert: int) -> None:
        """Fill ``buffer`` with a record: page-aligned, ``at.spec.nbytes`` long.

        Raises:
            ResourceError: The file was truncated, or the disk failed.
            IntegrityError: The bytes are not those that were written.
        """
        place = f"{at.file}, layer {layer}, expert {expert}"
        direct = self.direct  # another thread may give it up meanwhile
        try:
            align = RECORD_ALIGN if direct else 1
            osio.read_at(at.descriptor, buffer, at.offset, place, align=align)
        except ResourceError as error:
            # Some file systems take the flag and refuse the read.
            refused = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EINVAL
            if not refused or not direct:
                raise
            self._give_up(at.file)
            osio.read_at(at.descriptor, buffer, at.offset, place)
        check_record(buffer, at, layer, expert)

    def _give_up(self, file: str) -> None:
        if self.direct:
            _log.info("%s: the file system refuses direct reads; reading through the cache", file)
        self.direct = False
        for descriptor in self._descriptors:
            osio.set_direct(descriptor, False)
