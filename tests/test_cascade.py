"""Cascade attention against a dense mask, forward and backward pass, on random trees and by every style of primitive."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from stkit_kernels import backends
from stkit_kernels.backends import NAMES, Primitive, choose_backend, obstacle, primitive
from stkit_kernels.cascade import cascade_attention, merge
from stkit_kernels.memory import peak_bytes
from stkit_kernels.plan import plan_tree
from stkit_kernels.reference import dense_attention, visible_mask
from stkit_kernels.triton_tree import plan_blocks

CPU = torch.device("cpu")


def ends(lengths, parents) -> torch.Tensor:
    """``end`` of nodes given depth first, by walking up from every node."""
    starts = [sum(lengths[:k]) for k in range(len(lengths))]
    stops = [a + b for a, b in zip(starts, lengths)]
    below = list(stops)
    for k in range(len(lengths)):
        parent = parents[k]
        while parent >= 0:
            below[parent] = max(below[parent], stops[k])
            parent = parents[parent]
    return torch.cat([torch.full((n,), b) for n, b in zip(lengths, below)])


@st.composite
def random_ends(draw, longest: int = 40):
    """A random forest: each node hangs on the last one or on one of its ancestors, or is a root."""
    seed, count = draw(st.integers(0, 2**32)), draw(st.integers(1, 10))
    number = random.Random(seed)
    parents = [-1]
    for k in range(1, count):
        choices, at = [-1], k - 1
        while at >= 0:
            choices.append(at)
            at = parents[at]
        parents.append(number.choice(choices))
    return ends([number.choice((1, 2, 7, number.randint(1, longest))) for _ in range(count)], parents)


def tensors(tokens: int, heads: int = 4, kv: int = 2, size: int = 16, dtype=torch.float32, seed: int = 0):
    """q, k, v as Transformers hands them (heads moved to the front of (T, heads, D)), and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def make(n):
        return torch.randn(1, tokens, n, size, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_()

    return make(heads), make(kv), make(kv), make(heads).detach()


def both(attend, q, k, v, grad):
    out = attend(q, k, v)
    return out.detach(), torch.autograd.grad(out, (q, k, v), grad)


def assert_equal_to_dense(end, backend="auto", atol=2e-6, plan=None, **shape):
    q, k, v, grad = tensors(len(end), **shape)
    expected = both(lambda *x: dense_attention(*x, visible_mask(end)), *(x.double() for x in (q, k, v)), grad.double())
    found = both(lambda *x: cascade_attention(*x, plan or plan_tree(end), backend=backend), q, k, v, grad)
    for name, a, b in zip(("out", "dq", "dk", "dv"), (found[0], *found[1]), (expected[0], *expected[1])):
        assert a.dtype == q.dtype and a.shape == b.shape
        assert (a - b).abs().max() <= atol * max(1.0, b.abs().max().item()), name


GROUP = ends([50] + [13] * 4, [-1, 0, 0, 0, 0])
UNEQUAL = ends([33, 5, 9, 1, 20, 3, 17, 1, 2], [-1, 0, 1, 1, 0, 4, 4, 0, 0])
TREES = {
    "one token": ends([1], [-1]),
    "one branch": ends([5, 4], [-1, 0]),
    "a group": GROUP,
    "unequal lengths, depth 3": UNEQUAL,
    "a forest": ends([7, 3, 3, 1, 12, 1, 6], [-1, 0, 0, -1, -1, 4, 4]),
    "equal questions": ends([20, 6, 4, 4, 6, 4, 4], [-1, 0, 1, 1, 0, 4, 4]),
}


@given(random_ends())
@example(GROUP)
@example(UNEQUAL)
def test_any_tree_has_the_output_and_gradients_of_a_dense_mask(end):
    assert_equal_to_dense(end)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize(("heads", "kv"), [(2, 2), (4, 1), (7, 1)], ids=["gqa 1", "gqa 4", "gqa 7"])
def test_head_sizes_and_groups_of_heads(tree, size, heads, kv):
    assert_equal_to_dense(TREES[tree], heads=heads, kv=kv, size=size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_as_exact_as_they_can_be(dtype):
    assert_equal_to_dense(UNEQUAL, dtype=dtype, atol=1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps)


def test_a_branch_never_sees_its_sibling():
    """Perturb one rollout: every other token's output is the same to the bit."""
    q, k, v, _ = (x.detach() for x in tensors(len(GROUP)))
    before = cascade_attention(q, k, v, plan_tree(GROUP))
    for x in (q, k, v):
        x[:, :, 63:76] += 1.0
    after = cascade_attention(q, k, v, plan_tree(GROUP))
    others = torch.ones(len(GROUP), dtype=torch.bool)
    others[63:76] = False
    assert torch.equal(before[:, :, others], after[:, :, others]) and not torch.equal(before, after)


def test_a_scale_is_used():
    q, k, v, _ = tensors(len(GROUP))
    expected = dense_attention(q, k, v, visible_mask(GROUP), 0.7)
    assert torch.allclose(cascade_attention(q, k, v, plan_tree(GROUP), scale=0.7), expected, atol=1e-6)


def test_segments_of_like_size_share_a_call_and_few_calls_do():
    """Eight questions of four rotations each, all of different lengths: not one call a node."""
    number = random.Random(0)
    lengths, parents = [300], [-1]
    for _ in range(8):
        question = len(lengths)
        lengths.append(number.randint(30, 60)), parents.append(0)
        for _ in range(4):
            lengths.append(number.randint(30, 60)), parents.append(question)
    plan = plan_tree(ends(lengths, parents))
    assert len(plan.segments) == 41 and len(plan.calls) <= 6
    visible = int(visible_mask(plan.end).sum())
    assert plan.visible_pairs == visible and plan.padded_pairs < 0.15 * visible
    assert_equal_to_dense(plan.end, plan=plan)


def test_equal_siblings_are_read_in_place():
    plan = plan_tree(GROUP)
    assert [(c.count, c.q_len, c.k_len) for c in plan.calls] == [(1, 102, 50), (4, 13, 13)]
    assert all(c.q.index is None and c.k.index is None and c.real is None and c.mask is None for c in plan.calls)
    assert plan.padded_pairs == 0
    x = torch.randn(len(GROUP), 2, 3)
    assert plan.calls[1].q.take(x).data_ptr() == x[50].data_ptr()
    assert torch.equal(plan.calls[1].q.take(x)[2], x[76:89])


def test_a_chain_is_one_call_of_torchs_own():
    end = ends([5, 4, 3], [-1, 0, 1])
    assert len(plan_tree(end).calls) == 1
    assert_equal_to_dense(end)
    q, k, v, _ = tensors(len(end))
    made = cascade_attention(q, k, v, plan_tree(end)).grad_fn
    assert type(made).__name__ == "ScaledDotProductFlashAttentionForCpuBackward0"


@pytest.mark.parametrize("backward", [False, True])
def test_no_mask_of_tokens_by_tokens_is_ever_alive(backward):
    """A dense mask of T = 1,050 would be a megabyte even as one byte a pair; the tensors themselves are far smaller."""
    end = ends([800, *[10, 20, 30, 20, 10] * 3], [-1] + [0] * 15)
    q, k, v, grad = tensors(len(end), heads=2, kv=1, size=8)
    plan = plan_tree(end)

    def attend():
        out = cascade_attention(q, k, v, plan)
        if backward:
            torch.autograd.grad(out, (q, k, v), grad)

    dense = peak_bytes(lambda: dense_attention(q, k, v, visible_mask(end)))
    assert len(end) ** 2 <= dense, "the measure sees a mask where there is one"
    assert peak_bytes(attend) < len(end) ** 2 / 2


@pytest.mark.parametrize("name", ["flash-attn", "aten-flash", "aten-efficient", "triton"])
def test_nor_is_one_made_for_a_gpus_primitives(monkeypatch, name):
    """Primitives that do nothing: what is left is what the cascade itself holds, plan and list of blocks included."""
    end = ends([800, *[10, 20, 30, 20, 10] * 3], [-1] + [0] * 15)
    q, k, v, grad = tensors(len(end), heads=2, kv=1, size=8)

    def forward(q, k, v, *_):
        padded = q.dim() == 4
        return torch.zeros_like(q), torch.zeros(q.shape[:3] if padded else (q.shape[1], q.shape[0]))

    def backward(grad, q, k, v, *_):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    monkeypatch.setitem(backends._PRIMITIVES, name, Primitive(forward, backward))

    def attend():
        if name == "triton":
            return plan_blocks(end, 64, 64)
        out = cascade_attention(q, k, v, plan_tree(end), backend=backends.Backend(name, "", backends._STYLES[name]))
        return torch.autograd.grad(out, (q, k, v), grad)

    assert peak_bytes(attend) < len(end) ** 2 / 2


def test_merging_parts_of_a_softmax_gives_the_whole():
    scores, values = torch.randn(3, 5, 11, dtype=torch.float64), torch.randn(3, 11, 4, dtype=torch.float64)
    out, lse = torch.zeros(3, 5, 4, dtype=torch.float64), torch.full((3, 5), -math.inf, dtype=torch.float64)
    for piece in (slice(0, 4), slice(4, 5), slice(5, 11)):
        merge(out, lse, scores[..., piece].softmax(-1) @ values[:, piece], scores[..., piece].logsumexp(-1))
    assert torch.allclose(out, scores.softmax(-1) @ values) and torch.allclose(lse, scores.logsumexp(-1))


def twin_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale):
    """A varlen primitive in plain torch: as flash-attn, causal from the bottom right, log-sum-exp as (H, tokens)."""
    outs, sums = [], []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
        assert b - a <= max_q and d - c <= max_k
        scores = twin_scores(q[a:b], k[c:d], causal, scale)
        values = v[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, 1)


def twin_scores(q, k, causal, scale):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + scores.shape[2] - scores.shape[1])
        scores = scores.masked_fill(hidden, -math.inf)
    return scores


def twin_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale):
    """Its backward pass from a given output and log-sum-exp, written out from the formulas."""
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
        p = (twin_scores(q[a:b], k[c:d], causal, scale) - lse[:, a:b, None]).exp()
        dp = torch.einsum("qhd,khd->hqk", grad[a:b], v[c:d].repeat_interleave(groups, 1))
        ds = p * (dp - (grad[a:b] * out[a:b]).sum(-1).T[..., None]) * scale
        dq[a:b] = torch.einsum("hqk,khd->qhd", ds, k[c:d].repeat_interleave(groups, 1))
        dk[c:d] = torch.einsum("hqk,qhd->khd", ds, q[a:b]).unflatten(1, (-1, groups)).sum(2)
        dv[c:d] = torch.einsum("hqk,qhd->khd", p, grad[a:b]).unflatten(1, (-1, groups)).sum(2)
    return dq, dk, dv


@pytest.mark.parametrize("name", ["flash-attn", "aten-flash"])
@pytest.mark.parametrize("tree", TREES)
def test_the_varlen_calls_of_a_gpu_are_exact_with_a_twin_of_its_primitive(monkeypatch, tree, name):
    """What a GPU is asked for, computed on the CPU by a primitive of the same signature and conventions."""
    monkeypatch.setitem(backends._PRIMITIVES, name, Primitive(twin_forward, twin_backward))
    chosen = backends.Backend(name, "twin", "varlen")
    assert_equal_to_dense(TREES[tree], backend=chosen)


@pytest.mark.parametrize("tree", TREES)
def test_the_calls_for_a_t4_are_exact_with_a_twin_of_its_primitive(monkeypatch, tree):
    """Memory-efficient attention: equal head counts, an aligned bias, a log-sum-exp rounded up to 32 queries."""

    def forward(q, k, v, bias, compute_lse, dropout, causal, scale):
        assert q.shape[1] == k.shape[1] and compute_lse and dropout == 0.0
        assert bias is None or bias.stride(-2) % backends.ROUND == 0 and bias.shape == (*q.shape[:3], k.shape[2])
        mask = None if bias is None else bias[:, :1, :1]
        out, lse = backends._cpu_forward(q, k, v, causal, mask, scale)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf), None, None

    def backward(grad, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal, scale):
        assert lse.shape[-1] % 32 == 0 and wanted == (True, True, True, False) and seed.dtype == torch.int64
        mask = None if bias is None else bias[:, :1, :1]
        return *backends._cpu_backward(grad, q, k, v, out, lse[..., : q.shape[2]], causal, mask, scale), None

    calls = {
        "_scaled_dot_product_efficient_attention": forward,
        "_scaled_dot_product_efficient_attention_backward": backward,
    }
    monkeypatch.setattr(backends, "aten", SimpleNamespace(**{n: getattr(torch.ops.aten, n) for n in (
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")}, **calls))  # fmt: skip
    assert_equal_to_dense(TREES[tree], backend=backends.Backend("aten-efficient", "twin", "padded"))


@pytest.mark.parametrize("name", ["aten-flash", "aten-efficient"])
def test_torchs_cuda_primitives_take_our_arguments_and_give_our_shapes(name):
    """No GPU here: torch's own shape functions on pretended CUDA tensors check the calls against the installed torch."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    plan = plan_tree(UNEQUAL)
    with FakeTensorMode(allow_non_fake_inputs=True):
        make = {"device": "cuda", "dtype": torch.float16}
        total = len(UNEQUAL)
        q, k = torch.empty(total, 4, 64, **make), torch.empty(total, 2, 64, **make)
        if name == "aten-flash":
            bounds = [x.to("cuda") if isinstance(x, torch.Tensor) else x for x in plan.varlen()[0].bounds]
            out, lse = primitive(name).forward(q, k, k, *bounds, True, 0.1)
            back = primitive(name).backward(q, q, k, k, out, lse, *bounds, True, 0.1)
            assert lse.shape == (4, total)
        else:
            q, k = (x[None].transpose(1, 2) for x in (q, k))
            mask = torch.zeros(1, 1, 1, total, device="cuda")
            out, lse = primitive(name).forward(q, k, k, True, mask, 0.1)
            back = primitive(name).backward(q, q, k, k, out, lse, True, mask, 0.1)
            assert lse.shape == (1, 4, total)
        assert out.shape == q.shape and [x.shape for x in back] == [q.shape, k.shape, k.shape]


def test_the_choice_says_what_it_is_and_why():
    chosen = choose_backend(CPU, torch.float32, 64)
    assert (chosen.name, chosen.style) == ("cpu-flash", "padded") and "CPU" in chosen.why
    assert choose_backend(CPU, torch.float32, 64, "dense") == ("dense", "asked for", "dense")


@pytest.mark.parametrize("name", ["flash-attn", "aten-flash", "aten-efficient", "triton"])
def test_a_backend_that_cannot_be_used_is_an_error_with_the_reason(name):
    with pytest.raises(ValueError, match=f"'{name}' cannot be used: .*(CUDA GPU|TRITON_INTERPRET=1)"):
        cascade_attention(*tensors(4)[:3], plan_tree(ends([4], [-1])), backend=name)


def test_an_unknown_backend_is_told_which_there_are():
    with pytest.raises(ValueError, match="'flsh' is unknown: use auto, cpu-flash, flash-attn"):
        choose_backend(CPU, torch.float32, 64, "flsh")


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "expected"),
    [
        ((7, 5), torch.float16, 64, "aten-efficient"),
        ((8, 0), torch.float32, 64, "aten-efficient"),
        ((8, 0), torch.float16, 60, "dense"),
        ((8, 0), torch.float64, 64, "dense"),
        ((9, 0), torch.bfloat16, 128, "aten-flash"),
    ],
)
def test_what_is_chosen_on_gpus_that_are_not_here(monkeypatch, capability, dtype, size, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen = choose_backend(torch.device("cuda"), dtype, size)
    assert chosen.name == expected and "not flash-attn" in chosen.why
    assert {n for n in NAMES if not obstacle(n, torch.device("cuda"), dtype, size)} >= {expected, "dense"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda q, k, v: (q[0], k, v), "(4, 9, 16)"),
        (lambda q, k, v: (q, k[:, :, :8], v[:, :, :8]), "(1, 2, 8, 16)"),
        (lambda q, k, v: (q[:, :3], k, v), "H be a multiple of KV"),
        (lambda q, k, v: (q.half(), k, v), "one dtype and device"),
        (lambda q, k, v: (q, k.to("meta"), v), "one dtype and device"),
        (lambda q, k, v: (q[:, :, :8], k[:, :, :8], v[:, :, :8]), "8 tokens and a plan for 9"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, told):
    with pytest.raises(ValueError) as error:
        cascade_attention(*change(*tensors(9)[:3]), plan_tree(ends([5, 4], [-1, 0])))
    assert told in str(error.value)


@pytest.mark.parametrize("end", [[2, 3, 3], [1, 1], [4, 4, 4], [3, 2, 2], [0]])
def test_what_is_no_tree_laid_out_depth_first_is_refused(end):
    with pytest.raises(ValueError, match="depth first"):
        plan_tree(torch.tensor(end))


@pytest.mark.parametrize("end", [torch.tensor([]), torch.tensor([1.0]), torch.tensor([[1]])])
def test_an_end_of_another_kind_is_refused(end):
    with pytest.raises(ValueError, match="int64"):
        plan_tree(end)
