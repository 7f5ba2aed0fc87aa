"""Blind attacks: what can be told about the right option from text alone.

Each attack turns every option of every question into features; a linear model learns on some clips which option is
right, and says for the others which one it takes. No attack sees a frame, nor an answer of the clips it is scored on::

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

    ``owner`` (R,) is the question of a row, ``place`` (R,) its index in that question, ``right`` (R,) whether it is the
    answer.
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
        listed = {text: _items(text) for text in dict.fromkeys(self.texts)}
        self.names = list(dict.fromkeys(item for ways in listed.values() for way in ways for item in way))
        number = {item: n for n, item in enumerate(self.names)}  # numbers are quicker to compare than names
        numbered = {text: tuple(tuple(number[item] for item in way) for way in ways) for text, ways in listed.items()}
        self.items = [numbered[text] for text in self.texts]
        self.bags = [(_bag(words), *map(_bag, items)) for words, items in zip(self.words, self.items, strict=True)]
        shares = np.repeat(1 / np.array(sizes), sizes)
        self._mean = sparse.csr_matrix((shares, (self.owner, np.arange(len(self.owner)))))
        self._measured: dict = {}
        self._alike: dict = {}

    def centred(self, features):
        """Features less their mean over the options of the same question: what all options share tells nothing."""
        mean = self._mean @ features
        return features - mean[self.owner]

    def features(self, attack: str) -> sparse.csr_matrix:
        """(R, F) what an attack sees, measured once."""
        if attack not in self._measured:
            made = ATTACKS[attack](self)
            made = sparse.csr_matrix(made if attack == "majority letter" else self.centred(made))
            self._measured[attack] = self._by_kind(made) if attack in CROSSED else made
        return self._measured[attack]

    def _by_kind(self, features: sparse.csr_matrix) -> sparse.csr_matrix:
        """Features for all questions, and again for each task and order: what leaks may be turned around in reverse."""
        kinds = np.array([q.kind for q in self.questions])[self.owner]
        parts = [sparse.diags((kinds == kind).astype(float)) @ features for kind in sorted(set(kinds))]
        return sparse.hstack([features, *parts], format="csr")

    def alike(self, row: int, way: int, other: int) -> float:
        """Likeness (0 to 1) of what two options list, the first read forwards (way 0) or backwards (1)."""
        key = self.items[row][way], self.items[other][0]
        if key not in self._alike:
            shared = _overlap(self.bags[row][1 + way], self.bags[other][1])
            self._alike[key] = (shared + _agreement(*key)) / 2
        return self._alike[key]

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
    """(R, 26 a kind and size): the letter, alone, given how many options there are, and given the task and order."""
    sizes = np.array([len(q.options) for q in rows.questions])[rows.owner]
    kinds = np.array([q.kind for q in rows.questions])[rows.owner]
    masks = [np.ones(len(sizes), bool), *(of == value for of in (sizes, kinds) for value in sorted(set(of.tolist())))]
    out = np.zeros((len(rows.texts), len(LETTERS) * len(masks)))
    for block, mask in enumerate(masks):
        out[mask, block * len(LETTERS) + rows.place[mask]] = 1
    return out


def walk_features(rows: Rows) -> np.ndarray:
    """(R, 12): agreement with the options of the same walk's other questions, as they stand and read backwards.

    For the questions of the same task and for all others: mean and greatest likeness, and how often what the option
    lists turns up there.
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
        own = rows.items[row][way]
        likes = [rows.alike(row, way, j) for j in there]
        seen = [listed[item] / len(there) for item in own] or [0.0]
        found += [sum(likes) / len(likes), max(likes), sum(seen) / len(seen)]
    return found


def arrangement_features(rows: Rows) -> sparse.csr_matrix:
    """(R, 3 x 26 x 26 + 1): where the option stands, and where stand those that belong to it.

    Distractors that keep the order in which they were made give the truth away by the place of the option least like
    it; sorted ones by their rank; ones in the same order in another question on the walk by the option that has moved.
    """
    n = len(LETTERS)
    cells: list[tuple[int, int, float]] = []
    partners: dict[tuple, list[int]] = {}
    for k, question in enumerate(rows.questions):
        partners.setdefault((question.group, question.task), []).append(k)
    for k, question in enumerate(rows.questions):
        own = rows.options_of(k)
        ranks = np.argsort(np.argsort([rows.texts[i] for i in own], kind="stable"))
        others = [j for j in partners[question.group, question.task] if j != k]
        for p, i in enumerate(own):
            like = np.array([rows.alike(i, 0, j) if j != i else np.nan for j in own])
            like -= np.nanmean(like)
            cells += [(i, p * n + q, like[q]) for q in range(len(own)) if q != p]
            cells.append((i, n * n + p * n + int(ranks[p]), 1.0))
            for j in others:
                there = np.array([max(rows.alike(i, 0, r), rows.alike(i, 1, r)) for r in rows.options_of(j)])
                same = np.flatnonzero(there >= there.max() - 1e-12)
                share = 1 / (len(same) * len(others))
                cells += [(i, 2 * n * n + p * n + int(q), share) for q in same]
                cells += [(i, 3 * n * n, share * abs(p - int(q))) for q in same]
    at, column, value = zip(*cells, strict=True)
    return sparse.csr_matrix((value, (at, column)), shape=(len(rows.texts), 3 * n * n + 1))


def word_features(rows: Rows) -> sparse.csr_matrix:
    """(R, V) TF-IDF of n-grams: of the options' words, alone and together with the task and with the question's words,
    and of what the options list, freed of its wording and told forwards."""
    tokens = [" ".join(words) for words in rows.words]
    kinds = [rows.questions[k].kind for k in rows.owner]
    asked = ["_".join(WORD.findall(rows.questions[k].question.casefold()))[:80] for k in rows.owner]
    by_kind = [" ".join(f"{kind}|{w}" for w in text.split()) for kind, text in zip(kinds, tokens, strict=True)]
    by_question = [" ".join(f"{q}|{w}" for w in text.split()) for q, text in zip(asked, tokens, strict=True)]
    blocks = [sparse.csr_matrix((len(tokens), 1))]
    for texts, ngrams in ((tokens, (1, 3)), (by_kind, (1, 2)), (by_question, (1, 1)), (_listed(rows), (1, 4))):
        vectorizer = TfidfVectorizer(ngram_range=ngrams, token_pattern=r"\S+", sublinear_tf=True)
        if any(texts):
            blocks.append(vectorizer.fit_transform(texts))
    return sparse.hstack(blocks, format="csr")


def _listed(rows: Rows) -> list[str]:
    """One word for each thing that an option lists; what stands in every option of a task ("straight") is left out."""
    tasks = [rows.questions[k].task for k in rows.owner]
    ways = [int(rows.questions[k].order == "reverse") for k in rows.owner]
    names = ["_".join(item).replace(" ", "_") for item in rows.names]
    told = [[names[n] for n in items[way]] for items, way in zip(rows.items, ways, strict=True)]
    common: dict[str, set] = {}
    for task, things in zip(tasks, told, strict=True):
        common[task] = common.get(task, set(things)) & set(things)
    return [
        " ".join(["^", *(f"{task}|{thing}" for thing in things if thing not in common[task]), "$"])
        for task, things in zip(tasks, told, strict=True)
    ]


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
    mean, square = (np.asarray(f.mean(0)).ravel() for f in (features, features.multiply(features)))
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    return sparse.diags(1 / np.maximum(spread, 0.2))


ATTACKS: dict[str, Callable] = {
    "majority letter": letter_features,
    "option length": length_features,
    "medoid, bag of words": bag_features,
    "medoid, in order": order_features,
    "other questions on the walk": walk_features,
    "arrangement": arrangement_features,
    "words": word_features,
    "all together": all_features,
}


CROSSED = ("option length", "medoid, bag of words", "medoid, in order", "other questions on the walk")


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
        fix = "an audit learns on some clips and asks others, give two or more"
        raise StkitError(f"{len(chosen)} questions on {folds} clip: {fix}")
    features = rows.features(attack)
    ties = 1e-9 * np.random.default_rng(child_seed(seed, "ties", attack)).random(len(rows.texts))
    cut = GroupKFold(folds, shuffle=True, random_state=child_seed(seed, "folds") % 2**32)
    for train, test in cut.split(chosen, groups=groups[chosen]):
        learn = np.isin(rows.owner, chosen[train])
        model = LogisticRegression(C=1.0, solver="liblinear", class_weight="balanced", tol=0.1, random_state=0)
        model.fit(features[learn], rows.right[learn])
        told = np.isin(rows.owner, chosen[test])
        score = np.zeros(len(rows.texts))
        score[told] = model.decision_function(features[told]) + ties[told]
        for k in chosen[test]:
            taken[k] = int(np.argmax(score[rows.options_of(k)]))
    return taken
