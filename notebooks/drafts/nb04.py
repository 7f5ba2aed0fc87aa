from lib import Book
b = Book("04_cold_start.ipynb")
b.sub("## 1. Walks to learn from", "To be done in two minutes on a laptop, we ask", "To be done in a minute on a laptop, we ask")
b.sub("import shutil", 'clips=10, split="train", seed=0', 'clips=8, split="train", seed=4')
b.sub("import shutil", 'clips=8, split="test", seed=1', 'clips=6, split="test", seed=1')
b.sub("from stkit import load_model\n\nloaded", 'load_model("tiny", device', 'load_model("tiny-untrained", device')
b.sub("## 5. A run", "Back to ours: 160 updates, a walk each; what is learned is the `\"timeline\"` form. (The same in a shell: `stkit sft\nruns/cold_start/train --out runs/cold_start/run --steps 160`, and a `--set` for each of `wanted`.)",
"Back to ours: 120 updates, a walk each, of the model whose weights are still random; what is learned is the `\"timeline\"` form. (The\nsame in a shell: `stkit sft runs/cold_start/train --model tiny-untrained --out runs/cold_start/run --steps 120`, and a `--set` for each\nof `wanted`.)")
b.sub("from stkit import sft\n", '"train.save_every": 160', '"train.save_every": 120')
b.sub("from stkit import sft\n", 'model="tiny", out=folder / "run", steps=160', 'model="tiny-untrained", out=folder / "run", steps=120')
b.sub("from stkit import sft\n", '.iloc[[0, 9, 39, 79, 159]]', '.iloc[[0, 9, 39, 79, 119]]')
b.sub("The loss falls fast at first", '''Ask the trained model and the untrained one, greedily, about the walks that it was trained on and about those held out. `evaluate`
takes a question file, so each part's questions of the two tasks go into one.''', '''Ask the trained model and the untrained one, greedily, about the walks that it was trained on and about those held out; and beside
them `tiny`, which ships: what the same kind of training gives with 6,000 walks and hours in place of eight and a minute. It was made
for 32 frames, and has seen neither part. `evaluate` takes a question file, so each part's questions of the two tasks go into one.''')
b.set("from stkit import evaluate\nfrom stkit.bench.schema import row_of", '''
from stkit import evaluate
from stkit.bench.schema import row_of
from stkit.runs import write_jsonl

models = {"untrained": load_model("tiny-untrained", device="cpu"), "cold start": load_model(run.model, device="cpu")}
models["tiny"], shown_to = load_model("tiny", device="cpu"), {"untrained": 16, "cold start": 16, "tiny": 32}
results = {}
for part, questions in asked.items():
    write_jsonl(folder / part / "asked.jsonl", map(row_of, questions))
    for name, one in models.items():
        where = {"bench": folder / part / "asked.jsonl", "out": folder / f"{name}, {part}", "frames": shown_to[name]}
        results[name, part] = evaluate(model=one, mode="generate", max_new_tokens=160, progress=False, **where)
''', True)
b.set("from stkit.sampling import sample_indices\nfrom stkit.train.rewards", '''
from stkit.sampling import sample_indices
from stkit.train.rewards import Answered, true_timeline, well_formed


def seen_in(part, question, n=16):
    clip = next(c for c in benches[part].clips if c.id == question.clip_id)
    return timeline(load_truth(benches[part], clip.id), sample_indices(clip.frames, clip.fps, "uniform", n=n))


def as_rollouts(name, part, result):
    texts = dict(zip(result.predictions["id"], result.predictions["text"]))
    seen = {q.id: seen_in(part, q, shown_to[name]) for q in asked[part]}
    return [Answered(q, texts[q.id], len(texts[q.id]), True, 160, seen[q.id]) for q in asked[part]]
''')
b.sub("rows = []\nfor (name, part)", "as_rollouts(part, result)", "as_rollouts(name, part, result)")
b.sub("Read it column by column.", "Read it column by column.", "PROSE Read it column by column.")
b.sub("The difference in the first row", "The difference", "PROSE The difference")
b.save()
s = Book("solutions/04_cold_start.ipynb")
s.sub("import shutil", 'clips=10, split="train", seed=0', 'clips=8, split="train", seed=4')
s.sub('wanted = {"sft.form"', '"tiny", "tiny", folder', '"tiny-untrained", "tiny", folder')
s.save()
