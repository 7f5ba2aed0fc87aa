"""Blind attacks: what can be told about the right option from text alone.

Each attack turns every option of every question into features; a linear model learns on some clips which option is right, and
says for the others which one it takes. No attack sees a frame, nor an answer of the clips that it is scored on::

    rows = Rows(questions)
    taken = guess(rows, "option length", every_question)     # (n,) the index of the option taken
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from ..runtime import StkitError, child_seed
from .routes import parse, reverse
from .schema import LETTERS, Question, Route

FOLDS = 5
WORD = re.compile(r"[^\W_]+(?:'\w+)?")
PASSED = re.compile(r"\b(?:then|and|next|finally|the|an?|on|to|your|my|side|pass(?:ed|ing)?|by|walk|past|go|of|you)\b")
SEAM = re.compile(r"[,.;:\n]+|\bthen\b|\bnext\b|\band\b")
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "open": "close", "close": "open"}


class Rows:
    """All options of some questions, one row each, with what the attacks measure of them.

    ``owner`` (R,) is the question of a row, ``place`` (R,) its index in that question, ``right`` (R,) whether it is the answer.
    """

    def __init__(self, questions: Sequence[Question]):
        self.questions = list(questions)
        sizes = [len(q.options) for q in self.questions]
        self.owner = np.repeat(np.arange(len(sizes)), sizes)
        self.place = np.concatenate([np.arange(n) for n in sizes])
        self.start = np.concatenate([[0], np.cumsum(sizes)])
        self.texts = [text for q in self.questions for text in q.options]
        self.right = np.array([i == q.answer for q in self.questions for i in range(len(q.options))])
        self.words = [tuple(WORD.findall(text.casefold())) for text in self.texts]
        self.items = [_items(text) for text in self.texts]
        self.bags = [(_bag(words), *map(_bag, items)) for words, items in zip(self.words, self.items, strict=True)]
        self._mean = sparse.csr_matrix((np.repeat(1 / np.array(sizes), sizes), (self.owner, np.arange(len(self.owner)))))
        self._measured: dict = {}

    def centred(self, features):
        """Features less their mean over the options of the same question: what all options share tells nothing."""
        mean = self._mean @ features
        return features - mean[self.owner]

    def features(self, attack: str) -> sparse.csr_matrix:
        """(R, F) what an attack sees, measured once."""
        if attack not in self._measured:
            made = ATTACKS[attack](self)
            made = made if attack == "majority letter" else self.centred(made)
            self._measured[attack] = sparse.csr_matrix(made)
        return self._measured[attack]

    def options_of(self, question: int) -> range:
        """The rows of a question."""
        return range(self.start[question], self.start[question + 1])


def _items(text: str) -> tuple[tuple, tuple]:
    """What an option lists, in order, and the same for the way back; freed of its wording as far as possible."""
    try:
        route = parse(text)
        return _steps(route), _steps(reverse(route))
    except StkitError:
        listed = [tuple(WORD.findall(PASSED.sub(" ", part))) for part in SEAM.split(text.casefold())]
        listed = [item for item in listed if item]
        return tuple(listed), tuple(tuple(OPPOSITE.get(w, w) for w in item) for item in reversed(listed))


def _steps(route: Route) -> tuple[tuple, ...]:
    return tuple((s.kind, s.value, s.side) for s in route.steps)


def _bag(listed: Sequence) -> frozenset:
    """A multiset as a set: the second "left" is another element than the first."""
    seen: Counter = Counter()
    bag = []
    for item in listed:
        bag.append((item, seen[item]))
        seen[item] += 1
    return frozenset(bag)


def _overlap(a: frozenset, b: frozenset) -> float:
    """Share of what two bags have in common, whatever the order (Jaccard)."""
    return len(a & b) / len(a | b) if a or b else 0.0


def _agreement(a: Sequence, b: Sequence) -> float:
    """Share of places, counted from the front or from the back, that hold the same."""
    longest = max(len(a), len(b))
    if not longest:
        return 0.0
    front = sum(x == y for x, y in zip(a, b))
    back = sum(x == y for x, y in zip(reversed(a), reversed(b)))
    return max(front, back) / longest


def length_features(rows: Rows) -> np.ndarray:
    """(R, 6): characters and words, each as it is, ranked, and whether it is the most or least."""
    columns = []
    for size in (np.array([len(t) for t in rows.texts], float), np.array([len(w) for w in rows.words], float)):
        best, least = np.zeros(len(size)), np.zeros(len(size))
        for k in range(len(rows.questions)):
            own = rows.options_of(k)
            best[own], least[own] = size[own] == size[own].max(), size[own] == size[own].min()
        columns += [size / max(size.mean(), 1), best, least]
    return np.stack(columns, 1)


def _medoid(rows: Rows, likeness: Callable[[int, int], float]) -> np.ndarray:
    """(R, 3): mean and greatest likeness to the question's other options, and whether the mean is the greatest."""
    out = np.zeros((len(rows.texts), 3))
    for k in range(len(rows.questions)):
        own = rows.options_of(k)
        for i in own:
            like = [likeness(i, j) for j in own if j != i]
            out[i, :2] = sum(like) / len(like), max(like)
        out[own, 2] = out[own, 0] >= out[own, 0].max() - 1e-12
    return out


def bag_features(rows: Rows) -> np.ndarray:
    """Is it the option most like the others, in words and in what is listed, whatever the order?"""
    bags = rows.bags
    return _medoid(rows, lambda i, j: max(_overlap(bags[i][0], bags[j][0]), _overlap(bags[i][1], bags[j][1])))


def order_features(rows: Rows) -> np.ndarray:
    """Is it the option most like the others, place by place?"""
    words, items = rows.words, rows.items
    return _medoid(rows, lambda i, j: max(_agreement(words[i], words[j]), _agreement(items[i][0], items[j][0])))


def letter_features(rows: Rows) -> np.ndarray:
    """(R, 26 + 26 a number of options): the letter, and the letter given how many options there are."""
    sizes = np.array([len(q.options) for q in rows.questions])[rows.owner]
    kinds = {size: n for n, size in enumerate(sorted(set(sizes)))}
    out = np.zeros((len(rows.texts), len(LETTERS) * (1 + len(kinds))))
    at = np.arange(len(rows.texts))
    out[at, rows.place] = 1
    out[at, [len(LETTERS) * (1 + kinds[s]) + p for s, p in zip(sizes, rows.place, strict=True)]] = 1
    return out


def walk_features(rows: Rows) -> np.ndarray:
    """(R, 12): agreement with the options of the same walk's other questions, as they stand and read backwards.

    For the questions of the same task and for all others: mean and greatest likeness, and how often what the option lists
    turns up there.
    """
    groups: dict[str, list[int]] = {}
    for k, question in enumerate(rows.questions):
        groups.setdefault(question.group, []).append(k)
    out = np.zeros((len(rows.texts), 12))
    for k, question in enumerate(rows.questions):
        others = [j for j in groups[question.group] if j != k]
        for part, same in enumerate((True, False)):
            there = [r for j in others if (rows.questions[j].task == question.task) == same for r in rows.options_of(j)]
            if there:
                for i in rows.options_of(k):
                    out[i, 6 * part : 6 * part + 6] = _likeness(rows, i, there)
    return out


def _likeness(rows: Rows, row: int, there: list[int]) -> list[float]:
    found = []
    listed = Counter(item for j in there for item in set(rows.items[j][0]))
    for way in (0, 1):
        own, bag = rows.items[row][way], rows.bags[row][1 + way]
        likes = [(_overlap(bag, rows.bags[j][1]) + _agreement(own, rows.items[j][0])) / 2 for j in there]
        seen = [listed[item] / len(there) for item in own] or [0.0]
        found += [sum(likes) / len(likes), max(likes), sum(seen) / len(seen)]
    return found


def word_features(rows: Rows) -> sparse.csr_matrix:
    """(R, V) TF-IDF of n-grams of the options, alone and together with the task and with the question's words."""
    tokens = [" ".join(words) for words in rows.words]
    kinds = [rows.questions[k].kind for k in rows.owner]
    asked = ["_".join(WORD.findall(rows.questions[k].question.casefold()))[:80] for k in rows.owner]
    by_kind = [" ".join(f"{kind}|{w}" for w in text.split()) for kind, text in zip(kinds, tokens, strict=True)]
    by_question = [" ".join(f"{q}|{w}" for w in text.split()) for q, text in zip(asked, tokens, strict=True)]
    blocks = [sparse.csr_matrix((len(tokens), 1))]
    for texts, ngrams in ((tokens, (1, 3)), (by_kind, (1, 2)), (by_question, (1, 1))):
        vectorizer = TfidfVectorizer(ngram_range=ngrams, token_pattern=r"\S+", sublinear_tf=True)
        if any(texts):
            blocks.append(vectorizer.fit_transform(texts))
    return sparse.hstack(blocks, format="csr")


def all_features(rows: Rows) -> sparse.csr_matrix:
    """Everything that the other attacks see, side by side."""
    parts = []
    for name in ATTACKS:
        if name != "all together":
            made = rows.features(name)
            parts.append(made if name == "words" else made @ _even(made))
    return sparse.hstack(parts, format="csr")


def _even(features: sparse.csr_matrix) -> sparse.dia_matrix:
    """A diagonal that brings every column to a standard deviation of 1."""
    spread = np.asarray(features.todense()).std(0)
    return sparse.diags(1 / np.where(spread > 1e-9, spread, 1.0))


ATTACKS: dict[str, Callable] = {
    "majority letter": letter_features,
    "option length": length_features,
    "medoid, bag of words": bag_features,
    "medoid, in order": order_features,
    "other questions on the walk": walk_features,
    "words": word_features,
    "all together": all_features,
}


def guess(rows: Rows, attack: str, asked: np.ndarray, seed: int = 0) -> np.ndarray:
    """Which option an attack takes for each question, learnt on other clips (cross-validation by group).

    Args:
        attack: one of ``ATTACKS``.
        asked: (n,) bool, the questions to learn on and to answer (one task, or all).
        seed: of the folds and of how ties are broken.

    Returns:
        (n,) int64 index of the option taken; -1 where not asked.

    Raises:
        StkitError: fewer than two groups.
    """
    taken = np.full(len(rows.questions), -1)
    groups = np.array([q.group for q in rows.questions])
    chosen = np.flatnonzero(asked)
    folds = min(FOLDS, len(set(groups[chosen])))
    if folds < 2:
        raise StkitError(f"{len(chosen)} questions on {folds} clip: an audit learns on some clips and asks others, give two or more")
    features = rows.features(attack)
    ties = 1e-9 * np.random.default_rng(child_seed(seed, "ties", attack)).random(len(rows.texts))
    cut = GroupKFold(folds, shuffle=True, random_state=child_seed(seed, "folds") % 2**32)
    for train, test in cut.split(chosen, groups=groups[chosen]):
        learn = np.isin(rows.owner, chosen[train])
        model = LogisticRegression(C=1.0, solver="liblinear", class_weight="balanced", tol=1e-2, random_state=0)
        model.fit(features[learn], rows.right[learn])
        score = model.decision_function(features) + ties
        for k in chosen[test]:
            taken[k] = int(np.argmax(score[rows.options_of(k)]))
    return taken
