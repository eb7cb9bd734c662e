"""Personal data in a text, found by regular expressions: a heuristic, not a guarantee.

It finds email addresses, phone numbers, payment cards and IP addresses. It knows nothing of names,
postal addresses or numbers written out in words, and it takes some harmless text for personal.
Every pattern is bounded, so that the time is linear in the length of the text.
"""

from __future__ import annotations

import ipaddress
import re

_EMAIL = re.compile(r"\b[\w.%+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,8}\.[A-Za-z]{2,24}\b")
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
_PHONE = re.compile(
    r"(?<![\w+])\+\d{1,3}[ .()-]{0,2}\d(?:[ .()-]{0,2}\d){6,12}(?!\d)"
    r"|(?<![\w.-])(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])"
)
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = re.compile(rf"(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{6,39}(?![\w:])")


def find_personal_data(text: str) -> str | None:
    """Return what kind of personal data the text seems to hold, or None.

    The kinds: "email"; "card", 13 to 19 digits that pass the Luhn check; "phone", with a leading +
    or as 3-3-4 digits; "ip address", four decimal octets or at least three hexadecimal groups.
    """
    if _EMAIL.search(text):
        return "email"
    if any(_luhn(match[0]) for match in _CARD.finditer(text)):
        return "card"
    if _PHONE.search(text):
        return "phone"
    if _IPV4.search(text) or any(_is_ipv6(match[0]) for match in _IPV6.finditer(text)):
        return "ip address"
    return None


def _luhn(number: str) -> bool:
    """Tell whether the digits pass the check sum of payment cards."""
    digits = [int(digit) for digit in number if digit.isdigit()]
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    # A row of zeros passes the check sum, and is no card.
    return any(digits) and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_ipv6(candidate: str) -> bool:
    if sum(bool(group) for group in candidate.split(":")) < 3:
        return False
    try:
        ipaddress.IPv6Address(candidate)
    except ValueError:
        return False
    return True
