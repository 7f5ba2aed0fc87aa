"""Write a benchmark as a task of lmms-eval: task files, a ``utils.py`` that imports nothing of stkit, rows, a README.

    export_lmms_eval("runs/walks", "runs/walks-lmms")["tasks"]      # ['stkit_walks', 'stkit_walks_think', ...]

Three tasks ask the same questions: by letter, with think and answer tags, and blind (no frames), so that an accuracy
got there has its blind score beside it too. Open-ended questions (routes) are left out and counted. The functions under
"What utils.py holds" are copied into the task as they stand here; their parser reads plain answers only, and whatever
else is unresolved.
"""

import hashlib
import inspect
import json
import os
import re
import shlex
import unicodedata
from collections import Counter
from pathlib import Path

from ..runs import claim, explain, write_jsonl, write_text
from ..runtime import StkitError
from .schema import LETTERS, Benchmark, Question, benchmark_hash, load_benchmark

OURS = "Answer with the letter of the right option only."
THINK = "Output the thinking process in <think> </think> and the final answer in <answer> </answer> tags."
BASE = "_base_yaml"  # not "*.yaml", which lmms-eval takes for a task
TASKS = {  # what is added to the name: doc_to_visual, doc_to_text, new tokens
    "": ("doc_to_visual", "doc_to_text", 16),
    "_think": ("doc_to_visual", "doc_to_text_think", 1024),
    "_blind": ("doc_to_visual_blind", "doc_to_text", 16),
}


def export_lmms_eval(bench: str | Path, out: str | Path, split: str | None = None) -> dict:
    """Write the folder that ``lmms_eval --include_path`` takes.

    Args:
        bench: a benchmark folder or a question file. Its videos stay where they are; the task names them by absolute
            path.
        out: the task's folder; written anew if it is the export of the same benchmark.
        split: only that split; None for all.

    Returns:
        out, tasks (names), questions, left_out (open-ended ones), videos, splits (questions of each), metrics (names)
        and command.

    Raises:
        StkitError: no such benchmark, no multiple-choice question in it, a video that is not there, another folder.
    """
    benchmark, out = load_benchmark(bench), Path(out)
    asked = benchmark.select(split)
    questions = [q for q in asked if not q.is_open]
    if not questions:
        there = ", ".join(sorted({q.split for q in benchmark.questions}))
        raise StkitError(f"{bench}: no multiple-choice question of split {split!r} (there are {there}): choose another")
    videos = _videos(benchmark, questions)
    kinds = sorted({metric_of(q.task, q.order) for q in questions})
    name = task_name(benchmark.path)
    facts = {
        "out": str(out), "tasks": [name + added for added in TASKS], "questions": len(questions),
        "left_out": len(asked) - len(questions), "videos": len(videos),
        "splits": dict(sorted(Counter(q.split for q in questions).items())),
        "metrics": ["accuracy", "chance", "unresolved", *kinds], "command": _command(name, out, benchmark.info),
    }  # fmt: skip
    try:
        claim(out, _fingerprint(benchmark, split), name="export.json")
        write_jsonl(out / "questions.jsonl", [_row(q, videos[q.video]) for q in questions])
        write_text(out / "utils.py", utils_source())
        write_text(out / BASE, _base(out / "questions.jsonl", facts["metrics"]))
        for added, chosen in TASKS.items():
            write_text(out / f"{name}{added}.yaml", _task(name + added, *chosen))
        write_text(out / "README.md", _readme(name, benchmark, facts))
    except OSError as error:
        raise StkitError(explain(error)) from error
    return facts


def task_name(path: Path) -> str:
    """The task's name: that of the benchmark's folder or file, in letters that need no quotes anywhere."""
    plain = unicodedata.normalize("NFKD", path.resolve().stem if path.is_file() else path.resolve().name)
    return "_".join(["stkit", *re.findall(r"[a-z0-9]+", plain.encode("ascii", "ignore").decode().lower())])


def _videos(benchmark: Benchmark, questions: list[Question]) -> dict[str, str]:
    """The file of each video; a task whose frames are not there would be scored without them somewhere else."""
    paths = {q.video: benchmark.video_path(q.video).absolute() for q in questions}
    if missing := sorted(name for name, path in paths.items() if not path.is_file()):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise StkitError(f"{benchmark.path}: {', '.join(missing[:3])}{more} not in videos/: put the files there first")
    return {name: str(path) for name, path in paths.items()}


def _fingerprint(benchmark: Benchmark, split: str | None) -> dict:
    path = benchmark.path.resolve()
    digest = benchmark_hash(path) if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return {"benchmark": str(path), "sha256": digest, "split": split}


def _row(question: Question, video: str) -> dict:
    """One row as lmms-eval's functions get it. The answer is a letter, so that every row has the same types."""
    return {
        "id": question.id, "video": video, "group": question.group, "task": question.task, "order": question.order,
        "split": question.split, "question": question.question, "options": list(question.options),
        "answer": LETTERS[question.answer],
    }  # fmt: skip


def _base(data: Path, metrics: list[str]) -> str:
    """What the three tasks share. ``until`` is the end of a turn: lmms-eval's own default cuts at an empty line."""
    path = json.dumps(str(data.absolute()), ensure_ascii=False)  # as YAML quotes it too
    lines = [
        "dataset_path: json", "dataset_kwargs:", "  data_files:", f"    test: {path}",
        "test_split: test", "output_type: generate_until", "cluster_key: group", "score_key: score",
        "doc_to_target: !function utils.doc_to_target", "process_results: !function utils.process_results",
        "metric_list:",
    ]  # fmt: skip
    for metric in metrics:
        better = json.dumps(metric not in ("chance", "unresolved"))
        lines += [f"  - metric: {metric}", "    aggregation: !function utils.mean", f"    higher_is_better: {better}"]
    return "\n".join([*lines, "metadata:", "  - version: 1.0", ""])


def _task(name: str, visual: str, text: str, tokens: int) -> str:
    lines = [f"include: {BASE}", f"task: {name}", f"doc_to_visual: !function utils.{visual}"]
    lines += [f"doc_to_text: !function utils.{text}", "generation_kwargs:", f"  max_new_tokens: {tokens}"]
    lines += ["  temperature: 0", "  do_sample: false", "  num_beams: 1", '  until: ["<|im_end|>"]', ""]
    return "\n".join(lines)


def _command(name: str, out: Path, info: dict) -> str:
    frames = info.get("n_frames") or 32
    folder = shlex.quote(str(out.absolute()))
    return (
        "python -m lmms_eval --model qwen2_5_vl --model_args "
        f"pretrained=Qwen/Qwen2.5-VL-3B-Instruct,max_num_frames={frames} --tasks {name},{name}_blind "
        f"--include_path {folder} --batch_size 1 --log_samples --output_path results"
    )


def _readme(name: str, benchmark: Benchmark, facts: dict) -> str:
    splits = ", ".join(f"{count} {split}" for split, count in facts["splits"].items())
    sampling = benchmark.info.get("sampling") or "uniform"
    return f"""# {name}: a task for lmms-eval

{facts["questions"]} multiple-choice questions on {facts["videos"]} videos ({splits}), written by `stkit export`.
{facts["left_out"]} open-ended questions are left out.

```bash
pip install lmms-eval
{facts["command"]}
```

| task | what is asked |
| --- | --- |
| `{name}` | the letter of the right option |
| `{name}_think` | the same with think and answer tags |
| `{name}_blind` | the same as `{name}` without the video: no accuracy should stand without this one beside it |

- Metrics: {", ".join(f"`{metric}`" for metric in facts["metrics"])}. An answer that is not plainly one option is
  unresolved: it counts as wrong, and `unresolved` is the share of such answers. `chance` is the accuracy of guessing.
- Standard errors: take `stderr_clustered`. Questions on one walk share a cluster (`group`).
- Frames are chosen by lmms-eval's model, not by the task: this benchmark is made for {sampling} sampling of
  {benchmark.info.get("n_frames") or 32} frames. Accuracies are comparable with stkit's only for the same frames.
- Paths are absolute: where the videos or this folder lie elsewhere, export again there.
"""


def utils_source() -> str:
    """The text of ``utils.py``: the functions below, and what they need."""
    head = '"""Functions of this task, written by stkit export. They need nothing but Python."""\n\n'
    head += "import os\nimport re\n\n"
    head += f"LETTERS = {LETTERS!r}\nOURS = {OURS!r}\nTHINK = {THINK!r}\n"
    return head + "".join(f"\n\n{inspect.getsource(function)}" for function in UTILS)


# What utils.py holds.


def doc_to_visual(doc):
    """The video's file, which has to be there: nothing is scored without its frames."""
    if not os.path.isfile(doc["video"]):
        raise FileNotFoundError(f"{doc['video']} is not there: export the task again where the videos are")
    return [doc["video"]]


def doc_to_visual_blind(doc):
    """Nothing: the blind control."""
    return []


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    """Question, options, and what form the answer shall have."""
    return lettered(doc) + "\n" + OURS


def doc_to_text_think(doc, lmms_eval_specific_kwargs=None):
    """The same, asking for think and answer tags."""
    return lettered(doc) + "\n" + THINK


def lettered(doc):
    """The question with its options, each on a line of its own."""
    return "\n".join([doc["question"], "Options:", *(f"{k}. {o}" for k, o in zip(LETTERS, doc["options"]))])


def doc_to_target(doc):
    """The right letter."""
    return doc["answer"]


def process_results(doc, results):
    """What each metric gets of one answer: a score, and the cluster it belongs to."""
    said = parse(results[0], doc["options"])
    right = said is not None and LETTERS[said] == doc["answer"]
    scores = {"accuracy": right, "chance": 1 / len(doc["options"]), "unresolved": said is None}
    scores[metric_of(doc["task"], doc["order"])] = right
    return {name: {"score": float(score), "group": doc["group"], "id": doc["id"]} for name, score in scores.items()}


def metric_of(task, order):
    """The name of a category's accuracy."""
    return f"{task}_{order}"


def mean(items):
    """The share of a metric's items, NaN of none."""
    return sum(item["score"] for item in items) / len(items) if items else float("nan")


def parse(text, options):
    """The index of the option that a text plainly chooses; None: no answer, several, or one that is not plain."""
    found = {read(part, options) for part in answers(text)}
    return found.pop() if len(found) == 1 else None


def answers(text):
    """What stands in answer tags, else all outside of think tags. In a think tag left open only answer tags count."""
    outside = re.sub(r"<\s*think(?:ing)?\s*>.*?<\s*/\s*think(?:ing)?\s*>", "", text, flags=re.IGNORECASE | re.DOTALL)
    outside = re.split(r"<\s*/\s*think(?:ing)?\s*>", outside, flags=re.IGNORECASE)[-1]
    tagged = re.findall(r"<\s*answer\s*>(.*?)(?:<\s*/\s*answer\s*>|$)", outside, re.IGNORECASE | re.DOTALL)
    cut_off = re.search(r"<\s*think(?:ing)?\s*>", outside, re.IGNORECASE)
    return tagged if tagged or cut_off else [outside]


def read(text, options):
    """One answer: a letter, an option's own words, or a letter with its own option's words; anything else is None."""
    text = re.sub(r"[*`$]|<\|[^|>]*\|>", "", text)
    text = re.sub(r"(^|\bis|:)\s*\\boxed\s*\{([^{}]*)\}(?=\W*$)", r"\1 \2", text)
    bare = re.sub(r"^\s*(?:so\W+|therefore\W+)?(?:the\s+|my\s+)?(?:(?:final|correct|right|best)\s+)?"
                  r"(?:answer|option|choice)\s*(?:is\b|:)\s*:?\s*(?=\S)", "", text, flags=re.IGNORECASE)  # fmt: skip
    bare = re.sub(r"^\s*option\s+(?=\W?[A-Z]\b)", "", bare, flags=re.IGNORECASE)
    found = {place(text, options), place(bare, options)} - {None}
    label = re.match(r"\s*[(\[\"']?\s*([A-Za-z])\s*(?:[)\]\"'.:]+\s*|$)", bare)
    if label:
        index, rest = LETTERS.index(label[1].upper()), bare[label.end() :]
        fits = index < len(options) and (not re.search(r"\w", rest) or place(rest, options) == index)
        found.add(index if fits else None)
    return found.pop() if len(found) == 1 else None


def place(text, options):
    """The index of the option whose words a text is; None: of none, or of several. One letter is a label, no word."""
    said, *words = (" ".join(re.findall(r"\w+", words.casefold())) for words in (text, *options))
    plain = len(said) > 1 or said.isdigit()
    return words.index(said) if plain and words.count(said) == 1 else None


UTILS = (
    doc_to_visual, doc_to_visual_blind, doc_to_text, doc_to_text_think, lettered, doc_to_target, process_results,
    metric_of, mean, parse, answers, read, place,
)  # fmt: skip
