r"""Read a model's text: which option, or which route, does it say? Unresolved (None) rather than a guess.

Taking the first capital letter turns "Answer: C" into A and "Based on the video, D" into B. Here every letter and every
option's own text in the answer is found, what is denied, asked or supposed is struck out, and what is left must agree::

    >>> parse("Based on the video, D", ("left", "right", "back", "up"))
    3
    >>> parse("A or B", ("left", "right", "back", "up")) is None
    True

Letters of other scripts: compatibility forms (full-width, circled, mathematical) are the letter. Look-alikes count
where an option's label stands, if look and place in their own alphabet do not contradict (Cyrillic А and С, Greek Α
and Β); Cyrillic В looks like the second letter and is the third, so it is unresolved.

Source: the attitude is VLMEvalKit's ("can_infer"): unresolved, never wrong. Deviation: claims are ranked (an answer
that is named as such counts before a letter in passing), tags are read, and negations are struck out.
"""

import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from ..bench import routes
from ..bench.schema import LETTERS, Route
from ..runtime import StkitError
from . import phrases as ph
from .phrases import CJK, LETTER, MENTION, PUNCTUATION

LOOKALIKES = {"А": "A", "С": "C", "Α": "A", "Β": "B", "а": "a", "с": "c"}
SHORTEST_IN_PASSING = 4  # a shorter option ("no", "2") counts only where it is the answer, not in passing


@dataclass(frozen=True)
class _Claim:
    """A letter or an option's text in an answer.

    ``level`` 1: named as the answer, 2: chosen, 3: stands where an answer stands, 0: in passing.
    """

    index: int
    level: int
    start: int
    end: int
    mention: bool


def parse(text: str, options: Sequence[str]) -> int | None:
    """Which option a text chooses.

    Args:
        text: what the model wrote, think and answer tags included.
        options: the options' texts without letters, in the order of their letters.

    Returns:
        The option's index, or None when the text is unresolved: no answer, several that differ, a letter out of range,
        a letter and an option's text that contradict each other, or nothing but thinking.
    """
    options = _unlabelled(options)
    found = {_read(_tidy(part), options) for part in answer_parts(text)}
    return found.pop() if len(found) == 1 else None


def parse_route(text: str) -> Route | None:
    """The route that a text tells in its answer tag or outside of its thinking; None when it tells none, or several."""
    found = set()
    for part in answer_parts(text):
        try:
            found.add(routes.parse(part))
        except StkitError:
            return None
    return found.pop() if len(found) == 1 else None


def answer_parts(text: str) -> list[str]:
    """What a text offers as its answer: the contents of its answer tags, else all outside of think tags.

    Nothing inside think tags counts. After a think tag that is never closed only an answer tag counts.
    """
    said, depth, open_at = "", 0, 0
    position = 0
    for tag in re.finditer(r"<\s*(/?)\s*think(?:ing)?\s*>", text, re.IGNORECASE):
        if tag[1]:
            said, depth = (said, depth - 1) if depth else ("", 0)  # a stray closing tag: the prompt had opened it
        else:
            said += text[position : tag.start()] if not depth else ""
            depth, open_at = depth + 1, tag.end()
        position = tag.end()
    cut_off = depth > 0
    said += text[open_at:] if cut_off else text[position:]
    tagged = re.findall(r"<\s*answer\s*>(.*?)(?:<\s*/\s*answer\s*>|$)", said, re.IGNORECASE | re.DOTALL)
    if tagged or cut_off:
        return tagged
    return [said] if said.strip() else []


def _unlabelled(options: Sequence[str]) -> list[str]:
    """The options' texts; labels "A. ", "B) " are taken off when every option bears its own."""
    labels = [re.match(rf"\s*\(?{letter}[.):]\s*(?=\S)", option) for letter, option in zip(LETTERS, options)]
    if options and all(labels):
        return [option[label.end() :] for option, label in zip(options, labels)]
    return list(options)


def _tidy(text: str) -> str:
    """Fold what only looks different: compatibility forms, quotes, mark-up, LaTeX, look-alikes where a label stands."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'").replace("‘", "'")
    text = re.sub(rf"[{MENTION}\u200b-\u200f\u2060\ufeff\u00ad]|<\|[^|>]{{0,40}}\|>|<\s*/\s*answer\s*>", "", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mathsf|bf|rm)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:boxed|fbox)\s*\{([^{}]*)\}", r" answer: \1\n", text)
    text = re.sub(r"\\[()\[\]]|\$", " ", text)
    text = re.sub(r"<(b|strong|i|em|u|p|code|span)>([^<>]*)</\1>", lambda m: _quoted(m[2]), text, flags=re.IGNORECASE)
    text = re.sub(r"</\w+>", " ", text)
    text = re.sub(r"(\*{1,3}|_{1,3}|`)([^*_`\n]+?)\1", lambda m: _quoted(m[2]), text)
    text = re.sub(r"[\"'“”«»\[{(<]\s*([A-Za-z])\s*[.:]?\s*[\"'“”«»\]})>]", r"(\1)", text)
    text = re.sub(rf"(?<=[{CJK}])(?=[A-Za-z(])|(?<=[A-Za-z])(?=[{CJK}])", " ", text)
    stands = re.compile(rf"(?<!\w)[{''.join(LOOKALIKES)}](?=\s*[.):]|\W*$)", re.MULTILINE)
    return stands.sub(lambda m: LOOKALIKES[m[0]], text).strip()


def _quoted(inner: str) -> str:
    """The inside of bold, italics or code; a letter alone in it is bracketed, so that it is no article."""
    alone = re.fullmatch(r"\s*\(?([A-Za-z])\)?\s*([.:)]?)\s*", inner)
    return f"({alone[1]})" if alone else f"{inner}"


def _words(option: str) -> list[str]:
    """The words of an option's text, for a comparison that no case or punctuation disturbs."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", option).replace("’", "'"))


def _mask(text: str, options: list[str]) -> str | None:
    """Replace each option's text, longest first, by its one character. None: two options are the same words."""
    words = [_words(o) for o in options]
    plain = [" ".join(w).casefold() for w in words]
    for k in sorted(range(len(options)), key=lambda k: -len(plain[k])):
        if len(plain[k]) < 2 and not plain[k].isdigit():
            continue  # an option that is a letter itself cannot be told from a label
        pattern = r"(?<!\w)" + r"[^\w\ue000-\ue019]+".join(map(re.escape, words[k])) + r"(?!\w)"
        if len(words[k]) == 1:
            pattern += r"(?!\s+(?:answer|option|choice)\b)"  # "the right answer", where an option is "right"
        if plain.count(plain[k]) > 1:
            if re.search(pattern, text, re.IGNORECASE):
                return None
            continue
        text = re.sub(pattern, chr(0xE000 + k), text, flags=re.IGNORECASE)
    return text


def _join_labels(text: str) -> str | None:
    """Reduce "C. its own text" to "(C)"; several such pairs only repeat the options. None: they contradict."""
    pair = re.compile(rf"(\()?({LETTER})(\))?\s*([.):,\-–—])?\s*([{MENTION}])")
    said = set()

    def join(match: re.Match) -> str:
        letter, label, mention = match[2], match[1] or match[3] or match[4], match[5]
        if not label and letter in "AaIi" and ord(mention) - 0xE000 != LETTERS.find(letter.upper()):
            return mention  # an article or a pronoun
        said.add((LETTERS.find(letter.upper()), ord(mention) - 0xE000))
        return f"({letter})"

    joined = pair.sub(join, text)
    if any(letter != mention for letter, mention in said):
        return None
    return pair.sub(" ", text) if len(said) > 1 else joined


def _read(text: str, options: list[str]) -> int | None:
    """The option that one tidied answer chooses, or None."""
    masked = _mask(text, options)
    joined = _join_labels(masked) if masked is not None else None
    if joined is None:
        return None
    if not re.fullmatch(rf"{PUNCTUATION}(?:{LETTER}|[{MENTION}]){PUNCTUATION}", joined):
        for pattern in (ph.ASKED, ph.SUPPOSED, ph.DENIED_BEFORE, ph.DENIED_AFTER):
            joined = pattern.sub(" ", joined)
    return _decide(joined, _claims(joined, options), len(options))


def _decide(text: str, claims: list[_Claim], count: int) -> int | None:
    """The index on which the claims of the highest level agree (all claims, where the text hedges)."""
    level = min((c.level for c in claims if c.level), default=0)
    chosen = [c for c in claims if c.level == level]
    if not level or (level == 3 and ph.REFUSAL.search(text)):
        return None
    if ph.OPEN_END.search(text):
        return None
    for before, after in itertools.pairwise(claims):
        if (
            level in (before.level, after.level)
            and before.index != after.index
            and ph.JOINED.fullmatch(text[before.end : after.start])
        ):
            return None
    agreed = {c.index for c in (claims if level == 3 or ph.HEDGE.search(text) else chosen)}
    told = {c.index for c in claims if c.mention}
    if len(agreed) != 1 or (len(told) == 1 and told != agreed):
        return None
    index = agreed.pop()
    return index if index < count else None


def _claims(text: str, options: list[str]) -> list[_Claim]:
    """Every letter and every mention in a text, with how strongly it is claimed."""
    claims, said = [], [m.start() for m in re.finditer(rf"[\w{MENTION}]", text)]
    lists = len(ph.LIST_LABEL.findall(text)) > 1  # "A: no. B: yes." goes through the options, and does not begin with A
    for token in ph.TOKEN.finditer(text):
        before, after = text[max(0, token.start() - 90) : token.start()], text[token.end() : token.end() + 90]
        before, after = before.rsplit("\n", 1)[-1], after.split("\n", 1)[0]
        where = _where(token, before, after, token.start() == said[0] and not lists, token.start() == said[-1])
        if token["mention"]:
            index = ord(token["mention"]) - 0xE000
            level = _mention_level(text, index, where, after, options)
        elif _is_word(token["letter"], before, after, where):
            continue
        else:
            index, level = LETTERS.index(token["letter"].upper()), where
        claims.append(_Claim(index, level, token.start(), token.end(), bool(token["mention"])))
    return claims


def _where(token: re.Match, before: str, after: str, first: bool, last: bool) -> int:
    """The level that a token's place gives it."""
    ends = re.fullmatch(PUNCTUATION, after)
    starts = re.fullmatch(PUNCTUATION, before)
    if (
        ph.ANSWER_BEFORE.search(before)
        or ph.RIGHT_AFTER.match(after)
        or (ends and (starts or ph.CONCLUSION_BEFORE.search(before) or ph.COLON_BEFORE.search(before)))
    ):
        return 1
    bracketed = before.endswith("(") and after.startswith(")")
    if first and re.match(r"\)\s*[.:]" if bracketed else r"\s*[.):]", after):
        return 1
    if ph.PASSING_BEFORE.search(before):
        return 0
    if ph.CHOICE_BEFORE.search(before):
        return 2
    said = ph.SAYING_BEFORE.search(before) and (last or ph.VERB_AFTER.match(after))
    return 3 if token["mention"] or bracketed or first or said else 0


def _is_word(letter: str, before: str, after: str, where: int) -> bool:
    """Is this an article, a pronoun or another word of one letter rather than an option's letter?"""
    if (before.endswith("(") and after.startswith(")")) or ph.LABEL_BEFORE.search(before):
        return False
    ends = bool(re.fullmatch(PUNCTUATION, after))
    labels = bool(re.match(r"[.):]", after)) and not re.search(r"\w", before)
    if letter == "A":
        return not ph.NO_ARTICLE_AFTER.match(after)
    if letter in "aIi":
        return not (labels or (ends and where) or (where in (1, 2) and re.match(r"[.),;:]", after)))
    if letter.islower():
        return not (where in (1, 2) or labels or ends and where or after.startswith(")"))
    return False


def _mention_level(text: str, index: int, where: int, after: str, options: list[str]) -> int:
    """The level of an option's text: lower than its place says if it may begin another option or is in passing."""
    plain = [f" {' '.join(_words(o)).casefold()} " for o in options]
    inside_another = any(plain[index] in other for k, other in enumerate(plain) if k != index)
    if inside_another and not (where == 1 and re.match(r"\s*(?:[.;]|$)", after)):
        return 0
    if where == 3:
        short = len(plain[index]) - 2 < SHORTEST_IN_PASSING or len(text) > 2 * sum(map(len, options)) + 60
        return 0 if short or ph.NEGATION.search(text) else 3
    return where
