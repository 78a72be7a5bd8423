"""One function that takes secrets out of anything about to be stored, sent or printed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import yaml

HIDDEN = "<redacted>"

_SECRET_WORD = (
    r"secret|passw(?:or)?d|passphrase|(?:api|private|account|access)[_-]?key|credential"
    r"|authorization|(?<=[a-z0-9])_pwd"  # DB_PWD; PWD and OLDPWD are the shell's folders
)
_TOKEN_WORD = r"token(?!i[sz])"  # hf_token, authToken, tokens; not tokenizer, tokenised
_SECRET_KEY = re.compile(_SECRET_WORD, re.IGNORECASE)
# DB_PASS, pass; not passes, bypass, forward_passes. Like a token's, a number under it is a count
_TOKEN_KEY = re.compile(rf"{_TOKEN_WORD}|(?:^|[_.-])pass$", re.IGNORECASE)

_USERINFO = re.compile(r"(?P<scheme>\b[a-zA-Z][\w+.-]{0,30}://)[^/\s?#'\"]*@")
_BEARER = re.compile(r"\b(?P<kind>bearer)\s+(?!<redacted>)[\w.~+/=-]{8,}", re.IGNORECASE)
_KNOWN_SHAPES = re.compile(
    r"\b(?:hf_|ghp_|gho_|github_pat_|sk-|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_-]{16,}"
)
_ASSIGNMENT = re.compile(
    rf"(?P<key>(?:{_SECRET_WORD}|{_TOKEN_WORD})[\w.-]{{0,60}}[\"']?\s{{0,4}}[:=]\s{{0,4}})"
    r"(?P<value>\"[^\"\n]*\"|'[^'\n]*'|[^\s,&}\]\"']+)",
    re.IGNORECASE,
)
# `--password X`, `--hf-token X`; not where a file has it
_FLAG = re.compile(
    r"(?P<key>--(?![\w-]*(?:file|path|dir|stdin)\b)"
    rf"[\w-]*(?:{_SECRET_WORD}|{_TOKEN_WORD})[\w-]*\s+)"
    r"(?P<value>[\w\"'/+.][^\s]*)",
    re.IGNORECASE,
)
_PASS = re.compile(  # `PASS=x`, `db_pass: x`, `--db-pass x`; not `forward pass: x`
    r"(?P<key>(?:(?<=_)pass|(?<![a-z0-9])pass(?==)|(?-i:(?<![A-Za-z0-9])PASS))"
    r"[\"']?\s{0,4}[:=]\s{0,4}"
    r"|--(?:[\w-]*-)?pass(?:=|\s+))"
    r"(?P<value>\"[^\"\n]*\"|'[^'\n]*'|[^\s,&}\]\"']+)",
    re.IGNORECASE,
)
_USER = re.compile(r"(?P<key>(?<!\S)(?:-u|--user)[ =]\s*[^\s:/]+:)(?P<value>[^\s:/]+)")  # curl's
_SIGNED = re.compile(  # what lets whoever has the URL in
    r"(?P<key>[?&](?:sig|key|[\w-]*signature)=)(?P<value>[^&\s'\"]+)", re.IGNORECASE
)
_LOGIN = re.compile(r"(?P<key>\bwandb\s+login\b[^\n;|]*?\s)(?P<value>[0-9a-f]{40})\b")
_NUMBER = re.compile(r"[-+]?[\d.]+(?:e[-+]?\d+)?|true|false|null|none", re.IGNORECASE)


def is_secret_key(key: str, value: object = "") -> bool:
    """Does a value under this key have to be hidden? Counts such as `tokens: 4096` and `max_tokens:
    8` do not, nor words such as `passes`."""
    return bool(_SECRET_KEY.search(key)) or (
        bool(_TOKEN_KEY.search(key)) and isinstance(value, str)
    )


def redact(value: Any) -> Any:
    """A copy of `value` (string, mapping, list, scalar) without secrets; other types come back as
    they are.

    Hidden are: values under keys that match token, secret, password, api_key or credential;
    `user:password@` in URLs; `key=value` pairs with such keys inside strings; bearer headers and
    well-known token shapes; and, wherever they stand, the values of this process' environment
    variables with such names.
    """
    return _redact(value, _environment_secrets())


def redact_yaml(text: str) -> str:
    """Like `redact` for a YAML document: it also sees multi-line values. Comments go only if a
    value is hidden."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return redact(text)
    hidden = redact(tree)
    if hidden != tree:
        text = yaml.safe_dump(hidden, sort_keys=False, allow_unicode=True)
    return redact(text)


def _environment_secrets() -> list[str]:
    named = (value for key, value in os.environ.items() if is_secret_key(key, value))
    return sorted(
        # shorter values and numbers stand in any text by chance
        (value for value in named if len(value) >= 8 and not _NUMBER.fullmatch(value)),
        # the longest first: one that holds another would be hidden in part only
        key=len,
        reverse=True,
    )


def _redact(value: Any, known: list[str], under_token: bool = False) -> Any:
    """`under_token`: inside a value whose key says token, where strings are hidden and numbers are
    counts."""
    if isinstance(value, str):
        return HIDDEN if under_token else _redact_text(value, known)
    if isinstance(value, Mapping):
        return {
            _redact(key, known): HIDDEN
            if _SECRET_KEY.search(str(key))
            else _redact(item, known, under_token or bool(_TOKEN_KEY.search(str(key))))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(item, known, under_token) for item in value]
    return value


def _redact_text(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, HIDDEN)
    text = _USERINFO.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _BEARER.sub(rf"\g<kind> {HIDDEN}", text)
    text = _KNOWN_SHAPES.sub(HIDDEN, text)
    for shape in (_FLAG, _PASS, _USER, _SIGNED, _LOGIN):
        text = shape.sub(_hide_assigned, text)
    return _ASSIGNMENT.sub(_hide_assigned, text)


def _hide_assigned(match: re.Match[str]) -> str:
    key, value = match["key"], match["value"]
    if not _SECRET_KEY.search(key) and _NUMBER.fullmatch(value.strip("\"'")):
        return match[0]
    return f"{key}{HIDDEN}"
