"""The phrases by which stkit.vlm.answers tells an answer from a letter in passing.

    >>> bool(ANSWER_BEFORE.search("So the final answer is: "))
    True

One pattern for each thing that a text can do with a letter. ``..._BEFORE`` patterns end where the
letter begins, ``..._AFTER`` patterns start where it ends.
"""

import re

MENTION = "\ue000-\ue019"  # the k-th option's text stands in a text as the one character chr(0xE000 + k)
CJK = "\u0e00-\u0e7f\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"  # scripts that write no space before or after a letter
PUNCTUATION = rf"[^\w{MENTION}]*"
# No part of a word, a contraction, a hyphenated word (T-junction), an acronym (U.S.) or a name (C++).
LETTER = r"(?<!\w)(?<!\w['.-])[A-Za-z](?!\w)(?!'\w)(?!-\w)(?!\.\w\b)(?![+#])"
TOKEN = re.compile(rf"(?P<letter>{LETTER})|(?P<mention>[{MENTION}])")
CAPITAL = rf"(?:\((?:{LETTER})\)|(?-i:(?=[A-Z])){LETTER}|[{MENTION}])"
SEVERAL = rf"{CAPITAL}(?:\s*(?:,|/|&|\bor\b|\band\b|\bnor\b)+\s*(?:(?:or|and|nor|option)\s+)*{CAPITAL}){{0,25}}"


def _pattern(*parts: str) -> re.Pattern:
    return re.compile("".join(parts), re.IGNORECASE)


# What may stand between "answer" and the letter.
_GAP = (
    r"(?:[\s:=,\-–—>\"'(\[]|[是为は은는이]|\b(?:is|be|are|was|would|must|should|will|to|this|that|the|a|an|my|your|you|final|"
    r"correct|right|best|most|likely|option|choice|letter|one|clearly|definitely|therefore|thus|so|probably|question|"
    r"here|but|indeed|es|est|ist|é|è)\b){0,16}$"
)
# Named as the answer.
ANSWER_BEFORE = _pattern(
    r"(?:\b(?:answers?|ans|solution|conclusion|correct (?:option|choice|one|letter)|réponse|respuesta|antwort|",
    r"risposta|resposta|ответ)|答案|答え|正解|정답)",
    _GAP,
)
COLON_BEFORE = _pattern(r"(?:^|\w\w)[\"'\s)]*(?::|=|[-=]+>)\s*\(?$")
CONCLUSION_BEFORE = _pattern(
    r"\b(?:therefore|thus|hence|so|finally)\W+(?:(?:it's|it is|it must be|i'd say|i say|i choose)\s+)?\(?$"
)
RIGHT_AFTER = _pattern(
    r"\)?\s+(?:is|was|would be|must be|seems|looks)\s+(?:\w+\s+){0,2}?(?:correct|right|answer|best|true)\b"
)
# Chosen.
CHOICE_BEFORE = _pattern(
    r"(?:\b(?:options?|choices?|choose|chose|select(?:ed)?|pick(?:ed)?|g(?:o|oing) with|opt for|guess|letter)|",
    r"选项?|选择)",
    _GAP,
)
LIST_LABEL = _pattern(rf"(?:^|[.;,\n])\s*\(?{LETTER}\)?\s*[.):]")
LABEL_BEFORE = _pattern(r"\b(?:option|choice|letter)\s*[:(]?\s*$")
PASSING_BEFORE = _pattern(r"\b(?:in|of|than|like|as|from)\s+(?:option|choice|letter)?\s*\(?$")
# Stands where an answer stands: "I would say D" ends with one, "the room D" doesn't.
SAYING_BEFORE = _pattern(
    r"(?:^|[^\w\s]|[^\x00-\x7f]|\b(?:is|be|it's|say|with|to|was|think|believe|so|then|thus|es|ist|est|definitely|clearly|probably|",
    r"likely|perhaps|maybe|only|leaves))\s*\(?$",
)
VERB_AFTER = _pattern(r"\)?\s+(?:is|was|seems|looks|appears|matches|fits|does|because)\b")
# What may follow the letter A; before any other word it is an article.
NO_ARTICLE_AFTER = _pattern(
    r"\)?(?:\s+(?:is|was|are|seems?|looks?|appears?|match(?:es)?|fits?|shows?|describes?|because|since|as|for|due|given|based|would|",
    r"must|should|has|says|states|and|or|but|not|rather|over|than|instead|which|can|could|may|might|does|only|here|correctly|best|to|then)\b",
    rf"|\s*[^\w\s]|\s*$|\s*\n|\s*[{CJK}])",
)
# Denied, supposed or asked: struck out before anything is read.
DENIED_BEFORE = _pattern(
    r"(?:\b(?:not|cannot|neither|nor|never|rather than|instead of|rul\w+ out|eliminat\w+|exclud\w+|except|unlike|",
    r"reject\w*|discard\w*|dismiss\w*|other than|(?:any|every)thing but|не|nicht|pas)\b|n't\b|不是)\s*",
    r"(?:(?!but\b|so\b|then\b|because\b)\w+\s+){0,3}?",
    SEVERAL,
)
DENIED_AFTER = _pattern(
    SEVERAL,
    r"\s+(?:is|are|was|were|seems?|looks?|can|could|does|do|did|would|has|have|must)?\s*",
    r"(?:(?!correct\b|right\b|because\b|since\b|but\b|so\b)[a-z]\w*\s+){0,2}?",
    r"(?:not|n't|\w+n't|cannot|wrong|incorrect|false|impossible|invalid|unlikely|inconsistent|ruled|eliminated|excluded|out)\b",
)
SUPPOSED = _pattern(r"\b(?:if|whether|unless)\b[^.,;:!?\n]*")
ASKED = _pattern(r"(?:^|(?<=[.!?\n]))[^.!?\n]*\?")
# Of the whole text: it denies something, declines to answer, hedges, offers several, breaks off.
NEGATION = _pattern(r"\b(?:not|no|never|neither|nor|without|cannot|none|nothing)\b|n't\b")
REFUSAL = _pattern(
    r"\b(?:can't|cannot|can not|couldn't|could not|unable to|impossible to|hard to|difficult to)\b",
    r"|(?:\bnot|n't) (?:sure|certain|possible|enough|clear|visible|know)",
    r"|\b(?:unclear|uncertain|unknown|no idea|insufficient|sorry|none of|no (?:correct|right|valid)|unanswerable)\b",
)
HEDGE = _pattern(
    r"\b(?:could|might|may|maybe|perhaps|possibly|either|wait|actually|reflection|correction|scratch|alternatively|instead|changed|",
    r"hmm|however|also|plausible|possible|equally|both)\b|\bno,|\bor rather\b",
)
JOINED = _pattern(
    r"[)\s]*(?:[,/|&+]|\b(?:or|and|oder|et|ou|und|y|или|и)\b|或者?|和|还是)+[\s(]*",
    r"(?:\b(?:or|and|maybe|possibly|perhaps|even|option)\b[\s(]*)*",
)
OPEN_END = _pattern(r"(?:\bor|\band|/|&)\W*$")
