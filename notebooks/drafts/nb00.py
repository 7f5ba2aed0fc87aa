from lib import Book
b = Book("00_quickstart.ipynb")
b.sub("## 1. Build a benchmark", "Here it films six; a real\nstudy wants hundreds.", "Here it films six, on\nmaps that the model below has never seen (`split=\"test\"`); a real study wants hundreds.")
b.sub("made = build_benchmark(", 'clips=6, seed=0,', 'clips=6, seed=0, split="test",')
b.set("## 4. Ask a model all of them", '''
## 4. Ask a model all of them
`"tiny"` is a real Qwen2.5-VL of 3 million parameters that ships with the kit. The kit trained it from nothing, on walks through other
maps ([its card](../data_cards/tiny.md)). In `generate` mode it writes down what it sees, works out the answer and gives it. It is asked
twice, with the video and without (*blind*), so that no accuracy ever stands alone.
''')
b.sub("result = evaluate(folder", '''result = evaluate(folder / "walks", model="tiny", out=folder / "first", progress=False)''',
 '''asked = {"mode": "generate", "max_new_tokens": 256}
result = evaluate(folder / "walks", model="tiny", out=folder / "first", progress=False, **asked)''', None, "code")
b.set("## 5. Read the scores", '''
## 5. Read the scores
Each accuracy with its 95 % interval, chance and the blind score. `clusters` counts walks: questions on one walk are not
independent, and the interval knows it: six walks make it wide. Routes are open-ended: they have no options, so no chance level, and are
right when every step is.
''')
b.sub('scores = pd.DataFrame(result.scores["by_task"]).T', '.dropna().astype', '.astype')
b.set("## 6. Look at one prediction", '''
## 6. Look at one prediction
Every answer is kept with the thought that led to it. It begins with a *time line*: what the model saw in every two frames, three words
for what was done, what came into view and on which side. All else follows from that.
''')
b.set('row = result.predictions.set_index("id").loc[question.id]', '''
row = result.predictions.set_index("id").loc[question.id]
print(row.text)
print("right" if row.correct else "wrong")
''', True)
b.save()
