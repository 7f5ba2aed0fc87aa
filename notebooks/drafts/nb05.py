from lib import Book
b = Book("05_grpo_reverse_thinking.ipynb")
b.set("The two lines tell the same walk.", '''
The two lines tell the same walk.

## 2. A policy to begin with
It has to be right now and then, or there is nothing to reward. `tiny-cold` is: the recipe of the small model that ships, stopped
early ([04](04_cold_start.ipynb) shows such training). It writes down what it sees, then the route, then its reverse where the way back
is asked, and looks at the options last. Here is how it does on each question, decoded greedily.
''')
b.set("def told(question, k):", '''
from stkit import load_model
from stkit.sampling import sample_indices
from stkit.vlm.ask import decode
from stkit.vlm.prompts import build_prompt
from stkit.vlm.video import prepare, video_spec
from stkit.vlm.vision import encode_video
from stkit import read_video

bench, cold = load_benchmark(folder / "walks"), load_model("tiny-cold", device="cpu")
size = cold.processor.video_processor.size
bounds = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
films = {}
for clip in bench.clips:
    frames = read_video(bench.video_path(clip.video), sampling="uniform", n=32)
    films[clip.id] = prepare(frames, video_spec(cold.processor), **bounds)
''')
b.set("from dataclasses import replace", '''
def says(loaded, question, film):
    prompt = build_prompt(question, loaded.processor, loaded.record["family"], film, think=True)
    return decode(loaded, [prompt], film, encode_video(loaded.model, film), max_new_tokens=160)[0].text


for q in questions:
    print(f"{q.order}, right is {'ABCD'[q.answer]}:\\n{says(cold, q, films[q.clip_id])}\\n")
''', True, "code")
b.sub("from stkit.train.grpo import draw", '''write_jsonl(folder / "walks" / "asked.jsonl", map(row_of, questions))
weights = {"rewards.correct": 1.0, "rewards.format": 0.2, "rewards.reverse_consistency": 0.5, "rewards.timeline": 0}
wanted = common | weights | {"grpo.group": 8, "grpo.max_new_tokens": 40, "grpo.beta": 0.04, "train.lr": 3e-4}
job = begin("grpo", folder / "walks" / "asked.jsonl", start.model, "tiny", folder / "look", wanted, progress=False)''',
'''write_jsonl(folder / "walks" / "asked.jsonl", map(row_of, questions))
weights = {"rewards.correct": 1.0, "rewards.format": 0.2, "rewards.reverse_consistency": 0.5, "rewards.timeline": 0}
wanted = weights | {"grpo.group": 6, "grpo.max_new_tokens": 160, "grpo.beta": 0.04, "train.batch": 2, "data.per_clip": None}
wanted |= {"train.tower": False, "train.projector": False, "train.save_every": 1000, "train.schedule": "constant"}
wanted |= {"train.lr": 1e-4, "train.warmup": 0}
asked = folder / "walks" / "asked.jsonl"
job = begin("grpo", asked, "tiny-cold", "tiny", folder / "look", wanted, progress=False)''')
b.sub("from stkit.train.grpo import draw", "from stkit.train.grpo import draw", "from stkit.bench.schema import row_of\nfrom stkit.runs import write_jsonl\nfrom stkit.train.grpo import draw")
b.sub("`begin` and `draw` are the first half", "eight rollouts of each question", "six rollouts of each question")
b.set("It writes the form, and guesses.", '''
PROSE It writes the form, and guesses.

### Rewards by hand
*Correct* and *format* look at one rollout. (The library's `correct` reads answers as the evaluation does, its `format` is
stricter than this.)
''')
b.sub("## 6. A run", "The same, forty times, with fresh rollouts before each step. (In a shell: `stkit grpo runs/grpo/walks/asked.jsonl --model\nruns/grpo/start/model --steps 40`", "The same, sixteen times, with fresh rollouts before each step. (In a shell: `stkit grpo runs/grpo/walks/asked.jsonl --model\ntiny-cold --steps 16`")
b.set("from stkit import grpo\n\nasked", '''
from stkit import grpo

run = grpo(asked, model="tiny-cold", out=folder / "run", steps=16, overrides=wanted, progress=False)
print(run.text())
parts = ["reward_correct", "reward_format", "reward_reverse_consistency"]
display(run.metrics[["step", "reward", *parts, "kl", "length", "skipped_groups"]].iloc[[0, 3, 7, 11, 15]].round(3))
''', True, "code")
b.sub("first, last = (run.rollouts", "for step in (1, 40))", "for step in (1, 16))")
b.sub("And what does it rest on?", "The same questions, greedily, each with its own film and with the other walk's.", "The same questions, greedily, each with its own film and with the other walk's; and beside them `tiny-r1`, which is `tiny-cold` after\nGRPO on thousands of walks, each seen once or not at all ([its card](../data_cards/tiny_r1.md)).")
b.set("from stkit.vlm.ask import decode\nfrom stkit.vlm.prompts import build_prompt\nfrom stkit.vlm.vision import encode_video\n\nfilms =", '''
def right_with(loaded, film_of):
    found = [letter(says(loaded, q, films[film_of[q.clip_id]])) == q.answer for q in questions]
    return f"{sum(found)} of {len(found)}"
''', None, "code")
b.set("from stkit import load_model\n\nwalks", '''
walks = list(films)
own, other = dict(zip(walks, walks)), dict(zip(walks, walks[::-1]))
policies = {"before": cold, "after": load_model(run.model, device="cpu"), "tiny-r1": load_model("tiny-r1", device="cpu")}
table = {name: [right_with(policy, own), right_with(policy, other)] for name, policy in policies.items()}
display(pd.DataFrame(table, index=["its own film", "the other walk's"]).T)
''', True, "code")
b.sub("(By chance one of four.)", "(By chance one of four.)", "PROSE (By chance one of four.)")
b.set("### Exercise 2: a reward of your own", '''
### Exercise 2: a reward of your own
Does a rollout reverse its route rightly? Write `well_reversed(rollouts)`: for each rollout 1.0 if the two routes that stand in its text,
`Route: left, left. Reversed: right, right.`, are each other's reverse, else 0.0 (also when one is missing). `rollout.text` is
the text.
''')
b.set("def one_walk(rollouts):", '''
def well_reversed(rollouts):
    return [0.0 for rollout in rollouts]
''')
CHECK2 = '''
from stkit.train.rewards import Answered


def check():
    good = ["left, left. Reversed: right, right", "left, right, right. Reversed: left, left, right"]
    bad = ["left, left. Reversed: left, left", "left, right. Reversed: right, left", "left. Reversed: right, left", "left"]
    texts = [f"<think>Timeline: ahead. Route: {thought}.</think> <answer>A</answer>" for thought in [*good, *bad]]
    said = list(well_reversed([Answered(questions[0], text, 20, True, 40) for text in texts]))
    if wrong := [k for k, value in enumerate([1.0] * len(good) + [0.0] * len(bad)) if said[k : k + 1] != [value]]:
        return print(f"not yet: {said[wrong[0]]} for {texts[wrong[0]]}")
    print("right; grpo(..., rewards={'well_reversed': well_reversed}) takes it")


check()
'''
b.set("from stkit.train.rewards import Answered\n\n\ndef check():", CHECK2)
b.sub("### Exercise 3: what a wrong reward does", "Then guess what forty steps of it make", "Then guess what twelve steps of it make")
CHECK3 = '''
def check():
    texts = [(q, f"<think>It looks so.</think> <answer>{'ABCD'[k]}</answer>") for q in questions for k in range(4)]
    rollouts = [Answered(q, text, 20, True, 40) for q, text in texts]
    if list(wrong(rollouts)) != [float(k != q.answer) for q in questions for k in range(4)]:
        return print("not yet: letters A to D of each question get", *wrong(rollouts))
    own = wanted | {"rewards.correct": 0, "rewards.reverse_consistency": 0}
    shutil.rmtree(folder / "wrong", ignore_errors=True)
    how = {"steps": 12, "overrides": own, "rewards": {"wrong": wrong}, "progress": False}
    rows = grpo(asked, "tiny-cold", out=folder / "wrong", **how).metrics.iloc[[0, 3, 7, 11]]
    print("right. The reward of the policy that it makes, and how often that policy is right:")
    display(rows[["step", "reward"]].assign(right=1 - rows["reward_wrong"]).round(2))


check()
'''
b.set("def check():\n    rollouts = [Answered(q, told(q, k)", CHECK3, True, "code")
b.save()
s = Book("solutions/05_grpo_reverse_thinking.ipynb")
s.drop("def turns(route):")
s.set('every = [replace(q, id=', '''
weights = {"rewards.correct": 1.0, "rewards.format": 0.2, "rewards.reverse_consistency": 0.5, "rewards.timeline": 0}
wanted = weights | {"grpo.group": 6, "grpo.max_new_tokens": 160, "grpo.beta": 0.04, "train.batch": 2, "data.per_clip": None}
wanted |= {"train.tower": False, "train.projector": False, "train.save_every": 1000, "train.schedule": "constant"}
wanted |= {"train.lr": 1e-4, "train.warmup": 0}
''', False)
s.set("import re\nimport shutil", '''
import re
import shutil
from pathlib import Path

import torch

from stkit import build_benchmark, grpo, load_benchmark
from stkit.bench.schema import row_of
from stkit.runs import write_jsonl
''')
ex2 = b.at("### Exercise 2: a reward of your own").source
s.set("### Exercise 2: a reward of your own", ex2)
s.set("def one_walk(rollouts):", '''
def well_reversed(rollouts):
    return [float(_well_reversed(rollout.text)) for rollout in rollouts]


def _well_reversed(text):
    found = re.search(r"Route: ([a-z, ]+)\\. Reversed: ([a-z, ]+)\\.", text)
    if not found:
        return False
    there, back = (part.split(", ") for part in found.groups())
    return back == [{"left": "right", "right": "left"}.get(turn) for turn in reversed(there)]
''')
s.set("from stkit.train.rewards import Answered\n\n\ndef check():", CHECK2)
s.set("### Exercise 3: what a wrong reward does", b.at("### Exercise 3: what a wrong reward does").source)
s.set("def check():\n    rollouts = [Answered(q, told(q, k)", CHECK3, True, "code")
s.save()
