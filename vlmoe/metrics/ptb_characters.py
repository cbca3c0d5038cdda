"""The classes of characters that the tokenizer of CoreNLP 3.4.1 knows.

Letters, digits and capitals are those of Unicode 6.0, which that release was built with. Python's own tables are newer:
what became a letter, digit or capital later is listed here and is none. A character in no class is skipped.
"""

import unicodedata

_LATER_LETTERS = (
    "037F 0528-052F 0560 0588 05EF 0860-088E 08A1 08AD-08C9 0978 0980 09FC 0AF9 0C34 0C5A-0C5D 0C80 0CDD 0D04 "
    "0D54-0D5F 0E86 0E89 0E8C 0E8E-0E93 0E98 0EA0 0EA8-0EA9 0EAC 13F5-13FD 16F1-16F8 170D 171F 1878 191D-191E "
    "19B0-19C0 19C8-19C9 1B4C 1C80-1CBF 1CF2-1CF3 1CFA 2C2F 2C5F 312E-312F 31BB-31BF 4DB6-4DBF 9FCD-9FFF A698-A69D "
    "A78F A794-A79F A7AB-A7F7 A8FD-A8FE A9E0-A9FE AA7E-AA7F AB30-ABBF"
)
_NO_LONGER_LETTERS = "1885-1886"
_LATER_DIGITS = "0DE6-0DEF A9F0-A9F9"
_LATER_CAPITALS = "13A0-13F5"  # Cherokee letters had no case
_CAPITALS_THAT_ARE_NO_LETTERS = "2160-216F 24B6-24CF"
# Accents, vowel signs and other marks that a word may hold, beside letters.
_MARKS = (
    "00AD 02C2-02C5 02D2-02DF 02E5-02EB 02ED 02EF-036F 0375 0378-0379 0384-0385 03F6 0483-0487 055A-055F 0591-05BD "
    "05BF 05C1-05C2 05C4-05C5 05C7 0615-061A 064B-065E 0670 06D6-06E4 06E7-06ED 06FD-06FE 070F 0711 0730-074C "
    "07A6-07B0 07EB-07F3 0900-0903 093C 093E-094E 0951-0955 0962-0963 0981-0983 09BC 09BE-09C4 09C7-09C8 09CB-09CD "
    "09D7 09E2-09E3 0A01-0A03 0A3C 0A3E-0A4F 0A81-0A83 0ABC 0ABE-0ACF 0B82 0BBE-0BC2 0BC6-0BC8 0BCA-0BCD 0C01-0C03 "
    "0C3E-0C56 0D3E-0D44 0D46-0D48 0E31 0E34-0E3A 0E47-0E4E 0EB1 0EB4-0EBC 0EC8-0ECD"
)
# Symbols and marks outside ASCII that are a token each.
_SYMBOLS = (
    "00A1 00A6-00A9 00AC 00AE-00B1 00B4 00B6-00B8 00BF 00D7 00F7 037E 0387 0589 05BE 05C0 05C3 05C6 05F3-05F4 "
    "0600-0603 0606-060A 060C 0614 061B 061E-061F 066A 066D 06D4 0700-070D 07F6-07F8 0964-0965 0E4F 1FBD 2016-2017 "
    "2020-2023 2030-2038 203B 203E-2042 2044 207A-207E 208A-208E 2100-2101 2103-2106 2108-2109 2114 2116-2118 "
    "211E-2123 2125 2127 2129 212E 213A-213B 2140-2144 214A-214D 214F 2190-2BFF 3002 3012 30FB FF01-FF0F "
    "FF1A-FF20 FF3B-FF40 FF5B-FF65"
)


def _characters(ranges: str) -> frozenset[str]:
    bounds = [[int(bound, 16) for bound in item.split("-")] for item in ranges.split()]
    return frozenset(chr(code) for bound in bounds for code in range(bound[0], bound[-1] + 1))


_NOT_LETTERS, _OLD_LETTERS = _characters(_LATER_LETTERS), _characters(_NO_LONGER_LETTERS)
_NOT_DIGITS = _characters(_LATER_DIGITS)
_NOT_CAPITALS, _OTHER_CAPITALS = _characters(_LATER_CAPITALS), _characters(_CAPITALS_THAT_ARE_NO_LETTERS)

is_mark = _characters(_MARKS).__contains__
is_symbol = _characters(_SYMBOLS).__contains__


def is_letter(char: str) -> bool:
    return char in _OLD_LETTERS or (unicodedata.category(char)[0] == "L" and char not in _NOT_LETTERS)


def is_digit(char: str) -> bool:
    return unicodedata.category(char) == "Nd" and char not in _NOT_DIGITS


def is_uppercase(char: str) -> bool:
    return char in _OTHER_CAPITALS or (char.isupper() and is_letter(char) and char not in _NOT_CAPITALS)
