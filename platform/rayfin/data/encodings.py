"""Tell the encoding of a text by its bytes, where they leave no doubt."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import NamedTuple

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HIGH = re.compile(rb"[\x80-\xff]+")
_RUNS = re.compile(rb"[\x80-\xff]{2,}")

_COMMON_CHINESE = frozenset(
    "的一是不了在人有我他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可"
    "她里后小么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三"
    "已老从动两长知民样现分将外但身些与高意进把法此实回二理美点月明其种声全工己话儿者向情部正名定女"
    "问力机给等几很业最间新什打便位因重被走电四第门相次东政海口使教西再平真听世气信北少关并内加化由"
    "却代军产入先山五太水万市眼体别处总才场师书比住员九笑性通目华报立马命张活难神数件安表原车白应路"
    "，。、？！：；（）“”"
)
"""The most frequent characters of Chinese texts, and its punctuation."""

_LANGUAGES: tuple[tuple[str, str], ...] = (
    ("windows-1252", "äöüÄÖÜß"),  # German
    ("windows-1252", "àâæçéèêëîïôœùûüÿÀÂÇÉÈÊËÎÏÔŒÙÛÜ"),  # French
    ("windows-1252", "áéíñóúüÁÉÍÑÓÚÜ¡¿ªº"),  # Spanish
    ("windows-1252", "ãáâàçéêíóôõúÃÁÂÀÇÉÊÍÓÔÕÚªº"),  # Portuguese
    ("windows-1252", "àèéìíîòóùúÀÈÉÌÒÙ"),  # Italian
    ("windows-1252", "åäöæøéÅÄÖÆØÉ"),  # Danish, Norwegian, Swedish, Finnish
    ("windows-1250", "ąćęłńóśźżĄĆĘŁŃÓŚŹŻ"),  # Polish
    ("windows-1250", "áčďéěíňóřšťúůýžôľĺŕäÁČĎÉĚÍŇÓŘŠŤÚŮÝŽĽ"),  # Czech, Slovak
    ("windows-1250", "áéíóöőúüűÁÉÍÓÖŐÚÜŰ"),  # Hungarian
    ("windows-1250", "čćđšžČĆĐŠŽ"),  # Croatian, Slovenian
    ("windows-1250", "ăâîşţĂÂÎŞŢ"),  # Romanian
    ("windows-1254", "çğıöşüâÇĞİÖŞÜ"),  # Turkish
    ("windows-1257", "āčēģīķļņšūžąęėįųõäöüĀČĒĢĪĶĻŅŠŪŽĄĘĖĮŲÕ"),  # Baltic
    ("mac-roman", "äöüÄÖÜßàâçéèêëîïôùûáíñóúãõåæøÅÆØÉ"),
)
"""The letters beyond ASCII of languages, and the encoding that spreadsheets write them in."""

_EAST_ASIAN = ("gb18030", "big5", "shift_jis", "euc_jp", "euc_kr")
_CYRILLIC = "".join(map(chr, range(0x410, 0x450))) + "ёЁіїєґІЇЄҐ№"
_TYPOGRAPHY = "–—‘’‚“”„…•€£§°«»·×±²³µ©®™\xa0"
_LEAST_CHINESE, _LEAST_SHARE = 4, 0.2


class FoundEncoding(NamedTuple):
    """An encoding that a text may be in."""

    name: str
    certain: bool


def marked_encoding(start: bytes) -> str | None:
    """Return the encoding other than UTF-8 that a byte order mark at a file's start announces."""
    # The mark of UTF-32 begins with that of UTF-16.
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding
    return None


def find_encoding(raw: bytes) -> FoundEncoding | None:
    """Return the encoding of bytes that are not UTF-8, or None where nothing fits.

    UTF-16 and UTF-32 without a mark are told by where their zero bytes are, Chinese by its frequent
    characters, and a Windows code page by its letters: they must be those of one language, within
    words, and where another code page has letters of a language there, it must be the same ones.
    """
    if b"\0" in raw:
        wide = wide_encoding(raw)
        return FoundEncoding(wide, True) if wide else None
    if is_mostly_utf8(raw):
        return None
    chinese = _decoded(raw, "gb18030")
    if chinese is not None and _is_chinese(chinese):
        return FoundEncoding("gb18030", True)
    beyond = b"".join(_HIGH.findall(raw))
    readings = dict(_readings(beyond))
    if not readings:
        western = "".join(letters for name, letters in _LANGUAGES if name == "windows-1252")
        mixed = _in_letters(beyond, "windows-1252", western)
        return FoundEncoding("windows-1252", False) if mixed else None
    same = len(set(readings.values())) == 1
    return FoundEncoding(next(iter(readings)), same and _within_words(raw))


def is_mostly_utf8(raw: bytes) -> bool:
    """Whether bytes are UTF-8 beyond ASCII, of which a few places at most are broken."""
    runs = _RUNS.findall(raw)
    return sum(map(_is_utf8, runs)) > len(runs) / 2


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def wide_encoding(raw: bytes) -> str | None:
    """Return the encoding of two or four bytes a character that bytes are in, if any.

    It is told by where the zero bytes of ASCII's characters are; a few characters beyond it have
    one elsewhere (U+4E00, U+3000).
    """
    start = raw[: 2**16]
    zeros = [start[at::4].count(0) for at in range(4)]
    for name, empty, full in (
        ("utf-32-le", (2, 3), (0,)),
        ("utf-32-be", (0, 1), (3,)),
        ("utf-16-le", (1, 3), (0, 2)),
        ("utf-16-be", (0, 2), (1, 3)),
    ):
        if min(zeros[at] for at in empty) > 8 * max(zeros[at] for at in full):
            wide = name.startswith("utf-32")
            if not wide or all(zeros[at] >= len(start) // 4 for at in empty[:1]):
                return name if _decoded(raw, name) is not None else None
    return None


def _is_chinese(text: str) -> bool:
    beyond = [each for each in text if each > "\x7f"]
    common = sum(each in _COMMON_CHINESE for each in beyond)
    return common >= _LEAST_CHINESE and common >= _LEAST_SHARE * len(beyond)


def _readings(beyond: bytes) -> Iterator[tuple[str, str]]:
    """Yield (encoding, text) of each encoding in which bytes are letters of one language."""
    for encoding, letters in _LANGUAGES:
        if text := _in_letters(beyond, encoding, letters):
            yield encoding, text


def _in_letters(beyond: bytes, encoding: str, letters: str) -> str | None:
    """Return the text of bytes where all of it is of these letters, and of typography."""
    text = _decoded(beyond, encoding)
    if text is None or not any(map(str.isalpha, text)) or not {*letters, *_TYPOGRAPHY} >= {*text}:
        return None
    return text


def _within_words(raw: bytes) -> bool:
    """Whether letters beyond ASCII stand beside ASCII's, as those of Western languages do."""
    return re.search(rb"[a-z][\xc0-\xff]|[\xc0-\xff][a-z]", raw) is not None


def possible_encodings(raw: bytes) -> list[str]:
    """Return the usual encodings of scripts without Latin letters in which bytes are some text."""
    found = [name for name in _EAST_ASIAN if _decoded(raw, name) is not None]
    cyrillic = _in_letters(b"".join(_HIGH.findall(raw)), "windows-1251", _CYRILLIC)
    return [*found, "windows-1251"] if cyrillic else found


def _decoded(raw: bytes, encoding: str) -> str | None:
    """Return the text of bytes, which may end within a character."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(raw)
    except UnicodeDecodeError:
        return None
