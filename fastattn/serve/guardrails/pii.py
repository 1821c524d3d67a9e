"""Personal data and secrets by regular expressions and checksums. Each kind has an alphabet, and is looked for in the longest
runs of it: what ends a run ends every match in it, so prose is held back by a few characters only."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fastattn.serve.guardrails.guard import Finding, Scan, finished
from fastattn.serve.patterns import compile_pattern

Spans = Iterator[tuple[int, int]]


class Kind(NamedTuple):
    """alphabet: a character class. may_hold: whether a run of it is worth a look; if not, no part of it is. find: spans in a
    run."""

    alphabet: str
    may_hold: Callable[[str], bool]
    find: Callable[[str], Spans]


def _by_pattern(pattern: str, check: Callable[[str], bool] = lambda _: True) -> Callable[[str], Spans]:
    """Matches that no letter or digit touches."""
    compiled = compile_pattern(pattern)

    def find(run: str) -> Spans:
        for match in compiled.finditer(run):
            start, end = match.span()
            touches = (start and run[start - 1].isalnum()) or (end < len(run) and run[end].isalnum())
            if not touches and check(run[start:end]):
                yield start, end

    return find


def _luhn(digits: str) -> bool:
    doubled = "0246813579"  # cross sum of twice the digit
    return (sum(map(int, digits[-1::-2])) + sum(int(doubled[int(d)]) for d in digits[-2::-2])) % 10 == 0


def _is_card(digits: str, num_groups: int) -> bool:
    """Groups of two digits and more, or each digit by itself: a list of numbers has some of both."""
    if num_groups * 2 > len(digits) and num_groups != len(digits):
        return False
    return digits[0] in "23456" and len(set(digits)) > 1 and _luhn(digits)


_CARD_GROUPS = compile_pattern(r"\d+")


def _cards(run: str) -> Spans:
    """13 to 19 digits in whole groups, with one space or hyphen between, of a scheme's prefix and with Luhn's check digit."""
    groups = [match.span() for match in _CARD_GROUPS.finditer(run)]
    i = 0
    while i < len(groups):
        digits, last = "", i
        best: int | None = None
        while last < len(groups) and len(digits) < 19:
            if last > i and groups[last][0] - groups[last - 1][1] != 1:
                break
            digits += run[slice(*groups[last])]
            if 13 <= len(digits) <= 19 and _is_card(digits, last - i + 1):
                best = last
            last += 1
        if best is not None:
            yield groups[i][0], groups[best][1]
            i = best
        i += 1


# Country codes with the length of their IBANs (ISO 13616 registry).
_IBAN_LENGTHS = {
    code: int(length)
    for part in [
        "AD24",
        "AE23",
        "AL28",
        "AT20",
        "AZ28",
        "BA20",
        "BE16",
        "BG22",
        "BH22",
        "BR29",
        "BY28",
        "CH21",
        "CR22",
        "CY28",
        "CZ24",
        "DE22",
        "DK18",
        "DO28",
        "EE20",
        "EG29",
        "ES24",
        "FI18",
        "FO18",
        "FR27",
        "GB22",
        "GE22",
        "GI23",
        "GL18",
        "GR27",
        "GT28",
        "HR21",
        "HU28",
        "IE22",
        "IL23",
        "IQ23",
        "IS26",
        "IT27",
        "JO30",
        "KW30",
        "KZ20",
        "LB28",
        "LC32",
        "LI21",
        "LT20",
        "LU20",
        "LV21",
        "MC27",
        "MD24",
        "ME22",
        "MK19",
        "MR27",
        "MT31",
        "MU30",
        "NL18",
        "NO15",
        "PK24",
        "PL28",
        "PS29",
        "PT25",
        "QA29",
        "RO24",
        "RS22",
        "SA24",
        "SC31",
        "SE24",
        "SI19",
        "SK24",
        "SM27",
        "ST25",
        "SV28",
        "TL23",
        "TN24",
        "TR26",
        "UA29",
        "VA22",
        "VG24",
        "XK20",
    ]
    for code, length in [(part[:2], part[2:])]
}
_IBAN_START = compile_pattern(r"[A-Z]{2}\d{2}")


def _ibans(run: str) -> Spans:
    for match in _IBAN_START.finditer(run):
        start = match.start()
        length = _IBAN_LENGTHS.get(run[start : start + 2])
        if length is None or (start and run[start - 1].isalnum()):
            continue
        text, end = "", start
        while end < len(run) and len(text) < length:
            if run[end] != " ":
                text += run[end]
            elif run[end - 1] == " ":
                break
            end += 1
        if len(text) == length and not (end < len(run) and run[end].isalnum()):
            moved = text[4:] + text[:4]
            if int("".join(str(int(c, 36)) for c in moved)) % 97 == 1:
                yield start, end


def _is_ssn(text: str) -> bool:
    area, group, serial = text[:3], text[4:6], text[7:]
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000" and text[3] == text[6]


def _is_ip(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    is_word = address.version == 6 and not any(map(str.isdigit, text))  # a::b, face::bad of C++
    return not (address.is_unspecified or address.is_loopback or is_word)


_KEYS = (
    r"(?:sk-[A-Za-z0-9_-]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,}"
    r"|glpat-[A-Za-z0-9_-]{20,}|xox[abeoprs]-[A-Za-z0-9-]{10,}|AIza[0-9A-Za-z_-]{35}|hf_[A-Za-z0-9]{30,}"
    r"|npm_[A-Za-z0-9]{36}|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,})"
)
_PHONE = (
    r"(?:(?:\+|00)[1-9](?:[ ./-]?\(?\d\)?){7,14}"  # international
    r"|\(?[2-9]\d{2}\)?[ ./-]?[2-9]\d{2}[ .-]\d{4}"  # North American
    r"|0[1-9]\d{1,3}[ /-](?:\d[ -]?){4,8}\d)"  # national, elsewhere
)


def _has_digits(count: int) -> Callable[[str], bool]:
    return lambda run: len(run) >= count and sum(map(str.isdigit, run)) >= count


KINDS: dict[str, Kind] = {
    "email": Kind(
        r"[A-Za-z0-9._%+@-]",
        lambda run: "@" in run,
        _by_pattern(r"[A-Za-z0-9_%+-][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}"),
    ),
    "credit_card": Kind(r"[0-9 -]", _has_digits(13), _cards),
    "iban": Kind(r"[A-Z0-9 ]", _has_digits(5), _ibans),
    "us_ssn": Kind(r"[0-9 -]", _has_digits(9), _by_pattern(r"\d{3}[ -]\d{2}[ -]\d{4}", _is_ssn)),
    "phone": Kind(r"[0-9+() ./-]", _has_digits(6), _by_pattern(_PHONE)),
    "ip_address": Kind(
        r"[0-9A-Fa-f.:]",
        lambda run: run.count(".") >= 3 or run.count(":") >= 2,
        _by_pattern(r"(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*[0-9A-Fa-f:])", _is_ip),
    ),
    "api_key": Kind(r"[A-Za-z0-9_.-]", lambda run: len(run) >= 15, _by_pattern(_KEYS)),
}


class PIIGuard:
    is_linear = True
    needs_whole_text = False
    most_per_second: int | None = None

    def __init__(self, kinds: Sequence[str]) -> None:
        # Python's own engine: one class with a plus is linear there too, and it is quicker than RE2 for short matches.
        known = [name for name in KINDS if name in kinds]
        self._kinds = [(name, re.compile(KINDS[name].alphabet + "+"), KINDS[name]) for name in known]

    def scan(self, text: str, start: int, final: bool) -> Scan:
        found: list[Finding] = []
        settled = len(text)
        for name, runs, kind in self._kinds:
            for match in runs.finditer(text, start):
                begin, end = match.span()
                if end == len(text):
                    settled = min(settled, begin)  # what follows may belong to it
                run = match.group()
                if kind.may_hold(run):
                    found.append(Finding(begin, end, None))
                    found += [Finding(begin + s, begin + e, name) for s, e in kind.find(run)]
        found.sort(key=lambda f: (f.start, -f.end))
        return finished(found, text, settled, final)
