"""Reading and writing the small things a header is made of, with every length checked.

Source: docs/format.md, "Numbers".
"""

from __future__ import annotations

from clipq.errors import DamagedFileError

_MAX_VARINT_BYTES = 9  # 63 bits


class Sink:
    """Bytes being written."""

    def __init__(self) -> None:
        self.data = bytearray()

    def byte(self, value: int) -> None:
        self.data.append(value)

    def varint(self, value: int) -> None:
        """An integer of 0 to 2**63 - 1, seven bits a byte, low bits first, the top bit set on all but the last."""
        while value > 0x7F:
            self.data.append(value & 0x7F | 0x80)
            value >>= 7
        self.data.append(value)

    def raw(self, value: bytes) -> None:
        self.data += value


class Cursor:
    """Bytes being read; each read that would leave them raises `DamagedFileError`."""

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self._data = memoryview(data)
        self._what = what
        self.position = 0

    @property
    def left(self) -> int:
        return len(self._data) - self.position

    def raw(self, n: int) -> memoryview:
        if n > self.left:
            raise self.damaged(f"{n} bytes are announced and {self.left} are left")
        self.position += n
        return self._data[self.position - n : self.position]

    def byte(self) -> int:
        if self.position >= len(self._data):
            raise self.damaged("a byte more is announced and none is left")
        self.position += 1
        return self._data[self.position - 1]

    def varint(self, maximum: int = 2**63 - 1) -> int:
        value = shift = 0
        for _ in range(_MAX_VARINT_BYTES):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift:
                    raise self.damaged("a number is not in its shortest form")
                if value > maximum:
                    raise self.damaged(f"the number {value} is larger than {maximum}, the most it can be here")
                return value
            shift += 7
        raise self.damaged("a number has more than 63 bits")

    def text(self, n: int) -> str:
        try:
            return str(self.raw(n), "utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged("a text is not UTF-8") from error

    def end(self) -> None:
        """Raise unless everything has been read."""
        if self.left:
            raise self.damaged(f"{self.left} bytes are left over at its end")

    def damaged(self, why: str) -> DamagedFileError:
        return DamagedFileError(f"{self._what}: {why}; the file is damaged, get a whole copy of it")
