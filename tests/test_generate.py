"""Rollouts against Transformers' generate and forward pass, and against exact probabilities on a tiny vocabulary."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from test_ask import FAMILIES, MODELS, QUESTIONS, alone, make_video
from transformers import GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from stkit.runtime import BadUse, StkitError
from stkit.vlm import generate as module
from stkit.vlm import kvcache
from stkit.vlm.generate import Sampling, choose_tokens, filter_logits, generate
from stkit.vlm.logps import tree_logps
from stkit.vlm.prompts import build_prompt
from stkit.vlm.tree import trie


def asked(family: str, video, count: int = 4) -> list:
    return [build_prompt(q, MODELS[family].processor, family, video, think=True) for q in QUESTIONS[:count]]


def ids_of(prompts) -> list[tuple[int, ...]]:
    return [p.ids for p in prompts]


def logits_after(family: str, ids, video) -> torch.Tensor:
    """Transformers' logits after these tokens, all computed anew; sampled tokens count as text."""
    loaded = MODELS[family]
    kinds = [2 * (i == loaded.model.config.video_token_id) for i in ids]
    with torch.no_grad():
        return loaded.model(**alone(loaded, type("P", (), {"ids": ids, "mm_token_type_ids": kinds}), video)).logits[
            0, -1
        ]


@pytest.mark.parametrize("seen", [True, False], ids=["video", "blind"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rollouts_are_what_transformers_generates(family, seen):
    loaded, video = MODELS[family], make_video(family) if seen else None
    prompts = asked(family, video)
    stop = tuple(loaded.model.generation_config.eos_token_id)
    how = Sampling(greedy=True, max_new_tokens=7, stop=stop)
    found = generate(loaded.model, ids_of(prompts), video, sampling=how)
    plain = GenerationConfig(do_sample=False, max_new_tokens=7, eos_token_id=list(stop), pad_token_id=0)
    for prompt, (rollout,) in zip(prompts, found):
        theirs = loaded.model.generate(**alone(loaded, prompt, video), generation_config=plain)[0, len(prompt.ids) :]
        assert list(rollout.ids) == theirs.tolist()[: len(rollout.ids)] and len(rollout.ids) == min(7, len(theirs))
        assert rollout.finished == (rollout.ids[-1] in stop)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_forward_pass_also_where_time_runs_ahead_of_the_text(family):
    """Transformers' own generate goes on from the largest position, its forward pass does not: slow videos tell."""
    video = make_video(family)._replace(second_per_grid_s=90.0)
    model = MODELS[family].model
    prompts = ids_of(asked(family, video, 2))
    found = generate(model, prompts, video, group=3, sampling=Sampling(max_new_tokens=6, temperature=0.8))
    roots, last = trie(prompts)
    nodes = [[end.branch(r.ids, 1.0) for r in group] for end, group in zip(last, found)]
    scored = tree_logps(model, roots, [video], temperature=0.8)
    pieces = scored.packed.unpack(scored.log_probs)
    for node, rollout in zip(itertools.chain(*nodes), itertools.chain(*found)):
        assert (pieces[scored.packed.index(node)] - rollout.log_probs).abs().max() < 1e-5
    expected = torch.log_softmax(logits_after(family, prompts[0], video) / 0.8, -1)
    assert abs(found[0][0].log_probs[0] - expected[found[0][0].ids[0]]) < 1e-5


def test_sampled_rollouts_have_the_exact_distribution(monkeypatch):
    """All answers of two tokens over the four likeliest words: frequencies against exact probabilities."""
    family = "qwen2_5_vl"
    video = make_video(family)
    prompt = asked(family, video, 1)[0].ids
    probabilities = {}
    first = torch.softmax(filter_logits(logits_after(family, prompt, video), 4, 1.0), -1)
    for a in first.nonzero().flatten().tolist():
        second = torch.softmax(filter_logits(logits_after(family, (*prompt, a), video), 4, 1.0), -1)
        for b in second.nonzero().flatten().tolist():
            probabilities[a, b] = float(first[a] * second[b])
    assert len(probabilities) == 16 and sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert max(probabilities.values()) < 0.9
    (group,) = generate(MODELS[family].model, [prompt], video, group=4000, sampling=Sampling(max_new_tokens=2, top_k=4))
    counts = {pair: 0 for pair in probabilities}
    for rollout in group:
        counts[rollout.ids] += 1
        assert float(rollout.log_probs.sum().exp()) == pytest.approx(probabilities[rollout.ids], rel=1e-3)
    common = [pair for pair, p in probabilities.items() if 4000 * p >= 5]
    expected = [4000 * probabilities[pair] for pair in common] + [
        4000 * (1 - sum(probabilities[pair] for pair in common))
    ]
    observed = [counts[pair] for pair in common] + [4000 - sum(counts[pair] for pair in common)]
    kept = [(o, e) for o, e in zip(observed, expected) if e > 1e-6]
    assert (
        len(kept) > 2
        and stats.chisquare(*zip(*[(o, e * sum(observed) / sum(e for _, e in kept)) for o, e in kept])).pvalue > 0.01
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_does_not_depend_on_the_group_or_on_other_prompts(family):
    video = make_video(family)
    model, prompts = MODELS[family].model, ids_of(asked(family, video))
    how = Sampling(max_new_tokens=6, seed=5)
    large = generate(model, prompts, video, group=5, sampling=how)
    small = generate(model, prompts[:1], video, group=2, sampling=how)
    for a, b in zip(small[0], large[0]):
        assert a.ids == b.ids and (a.log_probs - b.log_probs).abs().max() < 1e-5
    assert len({r.ids for r in large[0]}) > 1
    assert generate(model, prompts[:1], video, group=2, sampling=replace(how, seed=6))[0][0].ids != small[0][0].ids


def test_rollouts_that_end_leave_the_batch_and_change_nothing_for_the_others(monkeypatch):
    family = "qwen2_5_vl"
    video = make_video(family)
    model, prompts = MODELS[family].model, ids_of(asked(family, video))
    how = Sampling(max_new_tokens=8, seed=1)
    whole = generate(model, prompts, video, group=4, sampling=how)
    stop = [r.ids[k] for k, r in ((2, whole[0][1]), (4, whole[1][0]), (0, whole[2][3]))]
    widths = []
    decode = kvcache.TreeCache._decode
    monkeypatch.setattr(
        kvcache.TreeCache, "_decode", lambda self, layer, q, *x: widths.append(len(q)) or decode(self, layer, q, *x)
    )
    ended = generate(model, prompts, video, group=4, sampling=replace(how, stop=tuple(stop)))
    assert widths == sorted(widths, reverse=True) and widths[-1] < widths[0] <= 16
    for a, b in zip(itertools.chain(*whole), itertools.chain(*ended)):
        places = [k for k, token in enumerate(a.ids) if token in stop]
        upto = places[0] + 1 if places else 8
        assert b.ids == a.ids[:upto] and b.finished == bool(places)
        assert (a.log_probs[:upto] - b.log_probs).abs().max() < 1e-5


def caches(monkeypatch) -> list:
    made = []

    class Kept(kvcache.TreeCache):
        def __init__(self, *x):
            super().__init__(*x)
            made.append(self)

    monkeypatch.setattr(module, "TreeCache", Kept)
    return made


def test_the_prompts_keys_and_values_are_stored_once_whatever_the_group(monkeypatch):
    family = "qwen2_5_vl"
    video, made = make_video(family), caches(monkeypatch)
    model, prompts = MODELS[family].model, ids_of(asked(family, video))
    for group in (1, 8):
        generate(model, prompts, video, group=group, sampling=Sampling(max_new_tokens=5, seed=1))
    config = model.config.get_text_config()
    token = (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * (config.hidden_size // config.num_attention_heads)
        * 4
    )
    tokens = len(made[0].packed)
    filling = sum(shelf.rows.numel() for shelf in made[0].shelves) - tokens
    assert tokens < sum(map(len, prompts)) and 0 <= filling < tokens / 2
    stored = [sum(x.numel() * 4 for s in c.shelves for x in s.keys + s.values) for c in made]
    assert stored == [(tokens + filling) * token] * 2
    assert made[1].keys[0].shape[2] == 5  # room for what is new, from the start


def test_a_prompt_that_goes_on_from_within_another_sees_only_its_own_path():
    """One prompt is the beginning of the other: its rollouts grow from a node that has children."""
    family = "qwen2_5_vl"
    video = make_video(family)
    model = MODELS[family].model
    short = asked(family, video, 1)[0].ids
    both = [short, (*short, 11, 12), (*short, 11, 13, 14), short]
    found = generate(model, both, video, sampling=Sampling(greedy=True, max_new_tokens=4))
    for prompt, (rollout,) in zip(both, found):
        (alone_,) = generate(model, [prompt], video, sampling=Sampling(greedy=True, max_new_tokens=4))
        assert rollout.ids == alone_[0].ids and (rollout.log_probs - alone_[0].log_probs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 1.0, 0.5), (3, 1.0, 1.0), (0, 0.6, 1.3), (5, 0.8, 0.7), (1, 0.01, 1.0)]
)
def test_the_distribution_is_filtered_as_transformers_does(top_k, top_p, temperature):
    torch.manual_seed(0)
    logits = torch.randn(6, 11) * 2
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    assert torch.equal(filter_logits(logits / temperature, top_k, top_p), expected)


def test_a_draw_picks_the_token_whose_share_it_falls_into():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).expand(4, -1)
    draws = torch.tensor([0.0, 0.19, 0.21, 0.71], dtype=torch.float64)
    tokens, log_probs = choose_tokens(logits, Sampling(), draws, [-1] * 4)
    assert tokens.tolist() == [0, 0, 1, 2]
    assert torch.allclose(log_probs.exp(), torch.tensor([0.2, 0.2, 0.5, 0.3]))


def test_a_think_that_takes_too_long_is_cut_and_an_answer_forced():
    family = "qwen2_5_vl"
    video = make_video(family)
    model, prompt = MODELS[family].model, asked(family, video, 1)[0].ids
    free = Sampling(max_new_tokens=12, seed=3)
    whole = generate(model, [prompt], video, group=4, sampling=free)[0]
    ending = whole[0].ids[1:3]  # the first rollout says this by itself in time
    cut = replace(free, think_budget=5, think_end=ending, forced=(9, 8, 7))
    found = generate(model, [prompt], video, group=4, sampling=cut)[0]
    assert found[0].ids == whole[0].ids and not any(found[0].forced)
    for a, b in zip(whole[1:], found[1:]):
        assert b.ids[:5] == a.ids[:5] and b.ids[5:8] == (9, 8, 7) and len(b.ids) == 12
        assert b.forced == (False,) * 5 + (True,) * 3 + (False,) * 4
    roots, last = trie([prompt])
    node = last[0].branch(found[1].ids, 1.0)
    scored = tree_logps(model, roots, [video])
    own = scored.packed.unpack(scored.log_probs)[scored.packed.index(node)]
    assert (own - found[1].log_probs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": 0.0}, "greedy=True"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"think_budget": 5}, "think_end and forced"),
        ({"think_budget": 9, "think_end": (1,), "forced": (1, 2), "max_new_tokens": 10}, "no room for an answer"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(values, told):
    with pytest.raises(BadUse) as error:
        Sampling(**values)
    assert told in str(error.value)


def test_prompts_that_cannot_be_decoded_are_refused_by_name():
    family = "qwen2_5_vl"
    video, model = make_video(family), MODELS[family].model
    prompt = asked(family, video, 1)[0].ids
    with pytest.raises(StkitError, match=r"and 5000 new ones exceed the model's context of 4096: lower max_new_tokens"):
        generate(model, [prompt], video, sampling=Sampling(max_new_tokens=5000))
    with pytest.raises(StkitError, match="begin in 2 ways"):
        generate(model, [prompt, (5, *prompt)], video)
    with pytest.raises(BadUse, match="0 prompts"):
        generate(model, [], video)
    with pytest.raises(BadUse, match="group=0"):
        generate(model, [prompt], video, group=0)


def test_out_of_memory_while_decoding_says_what_to_lower(monkeypatch):
    family = "qwen2_5_vl"
    video, model = make_video(family), MODELS[family].model

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(kvcache.TreeCache, "_decode", full)
    with pytest.raises(StkitError, match="out of memory: .* lower max_tokens, .* ask for fewer rollouts"):
        generate(model, [asked(family, video, 1)[0].ids], video, group=2, sampling=Sampling(max_new_tokens=3))


def test_scores_beyond_the_range_of_float16_are_decoded():
    """Qwen's queries and keys give unscaled scores over 65,504, which float16 doesn't hold."""
    packed = trie([[1, 2, 3]])[0][0].pack()
    plain = SimpleNamespace(plan=SimpleNamespace(end=packed.end), attend=lambda *x: x[1])
    cache = kvcache.TreeCache(packed, [0, 0], plain, max_new_tokens=1)
    q, k = torch.full((1, 2, 3, 64), 40.0).half(), torch.full((1, 1, 3, 64), 40.0).half()
    v = torch.arange(3.0).half()[None, None, :, None].expand(1, 1, 3, 64)
    assert not torch.isfinite(q[0, 0] @ k[0, 0].T).any()
    cache.attend(0, q, k, v, 0.125)
    cache.start()
    out = cache.attend(0, q[:, :, :1].expand(2, -1, -1, -1), k[:, :, :1].expand(2, -1, -1, -1), 5 * torch.ones(2, 1, 1, 64).half(), 0.125)
    assert torch.allclose(out, torch.full_like(out, (0 + 1 + 2 + 5) / 4))


def test_logits_that_are_no_numbers_are_an_error_and_never_a_token():
    with pytest.raises(StkitError, match="NaN"):
        choose_tokens(
            torch.tensor([[0.0, float("nan")]]), Sampling(greedy=True), torch.zeros(1, dtype=torch.float64), [-1]
        )
