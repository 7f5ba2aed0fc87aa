from lib import Book
b = Book("02_ask_a_model.ipynb")
b.set("## 1. A model", '''
## 1. A model
`"tiny"` has the architecture of Qwen2.5-VL with 3 million weights, which this kit trained from nothing ([its card](../data_cards/tiny.md)).
It ships with the kit and runs anywhere. On a GPU put `"Qwen/Qwen2.5-VL-3B-Instruct"` in its place; nothing else changes.
`attention` is what the vision tower computes with, `tree_attention` what the language model does.
''')
b.sub("## 2. A small benchmark", "Six walks, filmed (notebook 01 shows how).", "Four walks on maps that the model has not seen, filmed (notebook 01 shows how).")
b.sub("import tempfile", 'clips=6, seed=0,', 'clips=4, seed=0, split="test",')
b.sub("import tempfile", 'bench.clips[5], bench.video_path(bench.clips[5].video)', 'bench.clips[0], bench.video_path(bench.clips[0].video)')
b.sub("import tempfile", 'f"clip 5:', 'f"clip 0:')
b.sub("## 6. Tokens", "The prompt:", "The model was trained on 32 frames of each walk, so that is what it is asked with. The prompt:")
b.sub("from stkit.vlm.prompts import build_prompt", '''question = next(''', '''inputs = prepare(read_video(path, sampling="uniform", n=32), spec, **bounds)
question = next(''')
b.sub("tokenizer = loaded.processor.tokenizer", "assert prompt.ids.count(pad) == time * tall * wide // spec.merge**2", "assert prompt.ids.count(pad) == inputs.grid_thw.prod() // spec.merge**2")
b.sub("## 7. The answer, by letter", "The likeliest letter is the answer, so every question gets one and nothing has to be read out of a text.",
 "The likeliest letter is the answer, so every question gets one and nothing has to be read out of a text. It is how large models are\noften asked. **This one was never taught to answer so**: it has learned to look and think first, so expect chance here.")
b.set("All four are improbable", '''
All four are improbable: what this model expects to write next is `<think>`. As shares of the four letters:
''')
b.set("## 8. The answer, in words", '''
## 8. The answer, in words
In `generate` mode the model thinks and answers in tags, token by token. First comes the time line: for every two frames three words,
what was done, what came into view and on which side (`none` where there is nothing). Then the items that the question is about, then
what each option says, then the letters that are still alive after each item.
''')
b.set("from stkit.vlm.ask import decode", '''
from stkit.vlm.ask import decode

asked = build_prompt(question, loaded.processor, loaded.record["family"], inputs, think=True)
said = decode(loaded, [asked], inputs, features, max_new_tokens=256)[0]
print(said.text.replace(". ", ".\\n"))
print("\\nright is", "ABCD"[question.answer])
''', True)
b.set("Two more need no pictures.", '''
Two more need no pictures. *Blind* asks without the video, and `evaluate` runs it every time. *Circular* asks with the options under every
letter in turn, and right means right each time: a model that likes one letter falls to zero. Circular and blind ask by letter here, the
others let the model think.
''')
b.set("from stkit import evaluate\nfrom stkit.reporting.judge", '''
from stkit import evaluate
from stkit.reporting.judge import load_run

thinking = {"mode": "generate", "max_new_tokens": 192}
runs = {}
for control in ("none", "shuffled", "reversed", "single-frame", "circular"):
    how = {"mode": "letter"} if control == "circular" else thinking
    evaluate(folder / "walks", loaded, folder / control, control=control, blind=control == "none", progress=False, **how)
    runs[control] = load_run(folder / control)
print(*runs["none"].notices, sep="\\n")
''', True, "code")
b.set("Read the table from the top.", "PROSE")
b.save()
