"""JSON files -> blocks of lines or of the elements of an array -> objects."""

import gzip
import json
import re
import zlib
from codecs import BOM_UTF8, getincrementaldecoder
from collections.abc import Iterator
from itertools import chain

from chunkflow.data.files import unreadable
from chunkflow.data.messages import FORMS_SENTENCE, show

PIECE = 1 << 18  # bytes that are read, or decompressed, at once
NESTED = f"the JSON is nested too deeply: {FORMS_SENTENCE}"
SPACE = re.compile(r"[ \t\n\r]*")
Piece = tuple[bytes, int]  # of the decompressed file, and the bytes of the file up to its end
Part = tuple[str, int, bytes | str, int]  # as split_json yields them


def split_json(path: str, size: int) -> Iterator[Part]:
    """Blocks of about `size` bytes or characters, at least one row: "lines" or "array", the number of its
    first line or element, its text, and the bytes of the file up to its end.

    A *.json file is an array if its first character says so, else it is lines, as *.jsonl is. ValueError, one
    sentence with FILE:LINE, where it cannot be split; the blocks of all rows before come first.
    """
    pieces = _pieces(path)
    try:
        head = next(pieces, None)
    except ValueError as error:
        raise ValueError(f"{path}:1: {error}") from None
    if head is None:
        return
    is_array = path.removesuffix(".gz").removesuffix(".zst").endswith(".json")
    is_array = is_array and head[0].removeprefix(BOM_UTF8).lstrip()[:1] == b"["
    yield from (_split_array if is_array else _split_lines)(path, head, pieces, size)


def _pieces(path: str) -> Iterator[Piece]:
    """The content of a file, decompressed, piece by piece, and the bytes of the file up to there. ValueError
    where it cannot be read on."""
    try:
        with open(path, "rb", buffering=0) as file:
            read = file.read
            if path.endswith(".gz"):
                read = gzip.GzipFile(fileobj=file).read1
            elif path.endswith(".zst"):
                import pyarrow

                read = pyarrow.CompressedInputStream(file, "zstd").read
            while piece := read(PIECE):
                yield piece, file.tell()
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise ValueError(unreadable(error)) from None
        reason = " ".join(str(error).split())
        raise ValueError(
            f"from here on the compressed file is damaged or cut off ({reason}): get it again"
        ) from None


def _split_lines(path: str, head: Piece, pieces: Iterator[Piece], size: int) -> Iterator[Part]:
    parts, held, first, fault = [], 0, 1, None
    piece, position = head
    while piece:
        cut = piece.rfind(b"\n") + 1
        if cut and held + cut >= size:
            content = b"".join([*parts, piece[:cut]])
            yield "lines", first, content, position
            first += content.count(b"\n")
            parts, held, piece = [], 0, piece[cut:]
        parts.append(piece)
        held += len(piece)
        try:
            piece, position = next(pieces, (b"", position))
        except ValueError as error:
            piece, fault = b"", error
    content = b"".join(parts)
    if fault:  # the last line may be torn
        content = content[: content.rfind(b"\n") + 1]
    yield "lines", first, content, position
    if fault:
        line = first + content.count(b"\n")
        raise ValueError(f"{path}:{line}: {fault}")


def read_lines(path: str, first: int, content: bytes) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(content.split(b"\n"), first):  # bytes: only \n ends a line
        line = (line.removeprefix(BOM_UTF8) if number == 1 else line).rstrip()
        if not line:
            continue
        try:
            yield number, _parse_object(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None


def _parse_object(line: bytes) -> dict:
    try:
        row = json.loads(line.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} of the line is not UTF-8: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not valid JSON ({error.msg}, column {error.colno}): write one JSON object a line"
        ) from None
    except RecursionError:
        raise ValueError(NESTED) from None
    if not isinstance(row, dict):
        raise ValueError(f"{show(row)} is not a JSON object: {FORMS_SENTENCE}, write one a line")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON: write null, or remove it")


def _split_array(path: str, head: Piece, pieces: Iterator[Piece], size: int) -> Iterator[Part]:
    """Blocks of elements, with the commas between them. All that can be wrong with the JSON is found here."""
    text, first, row, more, fault = _ArrayText(head, pieces), 1, 1, True, None
    while more:
        try:
            more = text.pass_element(is_first=row == 1)
            row += more
        except ValueError as error:
            more, fault = False, error
        if text.size and (not more or text.size >= size):
            yield "array", first, text.take(), text.position
            first = row
    if fault:
        raise ValueError(f"{path}:{row}: {fault}")


def read_array(path: str, first: int, content: str) -> Iterator[tuple[int, dict]]:
    try:
        rows = json.loads(f"[{content}]")
    except RecursionError:
        raise ValueError(f"{path}:{first}: {NESTED}") from None
    yield from enumerate(rows, first)


ELEMENT = json.JSONDecoder(parse_constant=_refuse_constant)


class _ArrayText:
    """The text of a JSON array, element by element. Holds the elements since the last `take`, and a little of
    what follows. `size`: characters of these elements; `position`: bytes of the file that have been read."""

    def __init__(self, head: Piece, pieces: Iterator[Piece]):
        self._pieces, self._fault = chain([head], pieces), None
        self._decoder = getincrementaldecoder("utf-8-sig")()
        self._text, self._place = "", 0
        self._start: int | None = None  # of the first element that is held
        self._passed = 0  # characters before `_text`
        self.size = self.position = 0

    def take(self) -> str:
        """The elements passed since the last call."""
        taken = self._text[self._start : self._start + self.size]
        self._start, self.size = None, 0
        return taken

    def pass_element(self, is_first: bool) -> bool:
        """Goes to the end of the next element; False where there is none. ValueError for what is not JSON."""
        before = "[" if is_first else ","
        if (found := self._next()) == before:
            self._place += 1
            found = self._next()
            if found == "]" and not is_first:
                raise ValueError("not valid JSON (there is a comma before the ]): remove the comma")
        elif found and found != "]":
            raise ValueError(f"not valid JSON ({show(found)} where a comma or ] must be): correct it")
        if not found:
            raise ValueError("the file ends before the array does: it is cut off, get it again")
        if found == "]":
            self._place += 1
            if following := self._next():
                raise ValueError(
                    f"{show(following)} follows after the end of the array: write all rows into one array, or"
                    " one JSON object a line"
                )
            return False
        if self._start is None:
            self._start = self._place
        self._place = self._end_of_object()
        self.size = self._place - self._start
        return True

    def _end_of_object(self) -> int:
        while True:
            try:
                value, end = ELEMENT.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                # perhaps only since not all is here yet: 16 is more than the longest token but a string has
                torn = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16
                if torn and self._read_on():
                    continue
                where = f"{error.msg}, character {self._passed + error.pos + 1:,} of the file"
                raise ValueError(f"not valid JSON ({where}): correct it, or get the file again") from None
            except RecursionError:
                raise ValueError(NESTED) from None
            if isinstance(value, dict):
                return end
            if end < len(self._text) or not self._read_on():  # the end of a number may be missing
                raise ValueError(f"{show(value)} is not a JSON object: {FORMS_SENTENCE}")

    def _next(self) -> str:
        """The next character that is no white space, "" at the end of the file; goes there."""
        while True:
            self._place = SPACE.match(self._text, self._place).end()
            if self._place < len(self._text) or not self._read_on():
                return self._text[self._place : self._place + 1]

    def _read_on(self) -> bool:
        """Reads at least as much as there is after `_place`, so that long elements are not parsed often.
        False at the end of the file. ValueError where it cannot be read."""
        new, wanted = [], len(self._text) - self._place
        while wanted >= 0 and not self._fault:
            try:
                piece, self.position = next(self._pieces, (b"", self.position))
                new.append(self._decoder.decode(piece, final=not piece))
            except UnicodeDecodeError as error:
                new.append(error.object[: error.start].decode())
                byte = f"byte 0x{error.object[error.start]:02x}"
                self._fault = ValueError(f"{byte} is not UTF-8: save the file as UTF-8")
            except ValueError as error:
                self._fault = error
            else:
                wanted -= len(new[-1])
                if not piece:
                    break
        added = "".join(new)
        if self._fault and not added:
            raise self._fault
        keep = self._place if self._start is None else self._start
        self._passed += keep
        self._place -= keep
        self._start = None if self._start is None else 0
        self._text = self._text[keep:] + added
        return bool(added)
