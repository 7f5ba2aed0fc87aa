"""Log-probabilities without logits, against the softmax of all logits in float64, and what they hold in memory."""

import pytest
import torch
from stkit_kernels import logprob_torch
from stkit_kernels.logprob import log_probs_of, selected_log_probs
from stkit_kernels.memory import LiveStorages, peak_bytes
from torch._subclasses.fake_tensor import FakeTensorMode

EXACT = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 3e-6}
ROUNDING = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make(count=13, size=24, vocabulary=101, dtype=torch.float32, trained=False, biased=True, seed=0):
    """hidden, weight, targets, bias; the targets include the vocabulary's first and last token."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, size, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, size, generator=generator) / 3).to(dtype).requires_grad_(trained)
    bias = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_(trained) if biased else None
    targets = torch.randint(0, vocabulary, (count,), generator=generator)
    targets[:2] = torch.tensor([0, vocabulary - 1])[: len(targets)]
    return hidden, weight, targets, bias


def plain(hidden, weight, targets, bias=None, temperature=1.0):
    """By definition, with all logits, in float64."""
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.fixture(params=[5, 1024], ids=["rows in tiles", "rows at once"])
def tiled(request, monkeypatch):
    monkeypatch.setattr(logprob_torch, "ROWS", request.param)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_values_and_gradients_equal_those_of_all_logits(dtype, temperature, trained, tiled):
    hidden, weight, targets, bias = make(dtype=dtype, trained=trained)
    found = selected_log_probs(hidden, weight, targets, bias, temperature, entropy=True, chunk=17)
    log_p, spread = plain(hidden, weight, targets, bias, temperature)
    assert found.backend == "torch"
    assert found.log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(found.log_probs.double(), log_p, atol=EXACT[dtype], rtol=0)
    assert torch.allclose(found.entropy.double(), spread, atol=EXACT[dtype], rtol=0)
    inputs = [hidden, weight, bias] if trained else [hidden]
    one, other = torch.linspace(-2, 1, len(log_p)).double(), torch.linspace(0.5, -1, len(log_p)).double()
    sums = [(a.double() @ one, b.double() @ other) for a, b in ((found.log_probs, found.entropy), (log_p, spread))]
    for part in (slice(0, 1), slice(1, 2), slice(0, 2)):  # of the log-probabilities, of the entropies, of both
        ours, theirs = (torch.autograd.grad(sum(pair[part]), inputs, retain_graph=True) for pair in sums)
        for a, b in zip(ours, theirs):
            assert a.dtype == dtype
            assert (a.double() - b.double()).norm() <= ROUNDING[dtype] * b.double().norm()


def test_a_head_without_a_bias_is_differentiated_too():
    hidden, weight, targets, _ = make(trained=True, biased=False)
    ours = torch.autograd.grad(selected_log_probs(hidden, weight, targets, chunk=40).log_probs.sum(), [hidden, weight])
    theirs = torch.autograd.grad(plain(hidden, weight, targets)[0].sum(), [hidden, weight])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs))


def test_gradients_agree_with_finite_differences():
    hidden, weight, targets, bias = make(count=3, size=4, vocabulary=7, dtype=torch.float64, trained=True)

    def both(hidden, weight, bias):
        found = selected_log_probs(hidden, weight, targets, bias, 1.3, entropy=True, chunk=3)
        return found.log_probs, found.entropy

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h: both(h, weight.detach(), bias.detach()), (hidden,))


@pytest.mark.parametrize("chunk", [1, 2, 50, 100, 101, 102, 10_000, None])
def test_the_size_of_a_piece_changes_nothing(chunk):
    hidden, weight, targets, bias = make(dtype=torch.float64)
    found = selected_log_probs(hidden, weight, targets, bias, entropy=True, chunk=chunk)
    assert torch.allclose(found.log_probs, plain(hidden, weight, targets, bias)[0], atol=1e-12)
    assert torch.allclose(found.entropy, plain(hidden, weight, targets, bias)[1], atol=1e-12)


def test_a_uniform_distribution_is_known_without_computing():
    found = selected_log_probs(torch.zeros(2, 3), torch.randn(8, 3), torch.tensor([0, 7]), entropy=True, chunk=3)
    eighth = torch.tensor([8.0, 8.0]).log()
    assert torch.allclose(found.log_probs, -eighth) and torch.allclose(found.entropy, eighth)


def test_very_large_logits_neither_overflow_nor_lose_the_answer():
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    found = selected_log_probs(torch.tensor([[3e4], [-3e4]]), weight, torch.tensor([0, 0]), entropy=True, chunk=1)
    assert found.log_probs.tolist() == [0.0, -6e4] and found.entropy.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("trained", [False, True])
def test_tokens_that_a_bias_forbids_leave_no_nan(trained):
    hidden, weight, targets, bias = make(trained=trained)
    bias = bias.detach().clone()
    bias[40:90] = float("-inf")  # whole pieces, the first of a pass among them if it begins there
    targets = targets.clamp(max=39)
    found = selected_log_probs(hidden, weight, targets, bias, entropy=True, chunk=10)
    kept = torch.cat([torch.arange(40), torch.arange(90, 101)])
    log_p, spread = plain(hidden, weight[kept], targets, bias[kept])
    assert torch.allclose(found.log_probs.double(), log_p, atol=3e-6)
    assert torch.allclose(found.entropy.double(), spread, atol=3e-6)
    (ours,) = torch.autograd.grad(found.log_probs.sum() + found.entropy.sum(), hidden)
    (theirs,) = torch.autograd.grad(log_p.sum() + spread.sum(), hidden)
    assert torch.allclose(ours, theirs, atol=1e-5)
    bias[:10] = float("-inf")
    first = selected_log_probs(hidden, weight, torch.full_like(targets, 20), bias, chunk=10).log_probs
    assert first.isfinite().all()


def test_a_nan_stays_a_nan_in_its_row_and_nowhere_else():
    hidden, weight, targets, bias = make()
    hidden = hidden.detach().clone()
    hidden[4, 7] = float("nan")
    hidden.requires_grad_()
    found = selected_log_probs(hidden, weight, targets, bias, entropy=True, chunk=17)
    only = torch.arange(len(targets)) == 4
    assert torch.equal(found.log_probs.isnan(), only) and torch.equal(found.entropy.isnan(), only)
    found.log_probs.sum().backward()
    assert torch.equal(hidden.grad.isnan().any(1), only)
    assert torch.equal(log_probs_of(hidden, weight, targets[:, None], bias).isnan()[:, 0], only)


def test_no_rows_give_no_values_and_zero_gradients():
    hidden, weight, targets, bias = make(count=0, trained=True)
    found = selected_log_probs(hidden, weight, targets, bias, entropy=True)
    assert found.log_probs.shape == found.entropy.shape == (0,)
    found.log_probs.sum().backward()
    assert hidden.grad.shape == hidden.shape and not weight.grad.any() and not bias.grad.any()
    assert log_probs_of(hidden, weight, targets[:, None].expand(0, 4)).shape == (0, 4)


def test_several_tokens_of_a_row_equal_one_call_for_each():
    hidden, weight, _, bias = make()
    letters = torch.stack([torch.tensor([3, 100, 0, 51]).roll(i) for i in range(len(hidden))])
    found = log_probs_of(hidden, weight, letters, bias, temperature=0.5, chunk=13)
    assert found.shape == (13, 4) and not found.requires_grad
    for i in range(4):
        expected = plain(hidden, weight, letters[:, i], bias, 0.5)[0]
        assert torch.allclose(found[:, i].double(), expected, atol=1e-5)


def test_autocast_does_not_round_what_is_float32():
    hidden, weight, targets, bias = make(trained=True)
    expected = selected_log_probs(hidden, weight, targets, bias, entropy=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = selected_log_probs(hidden, weight, targets, bias, entropy=True)
        letters = log_probs_of(hidden, weight, targets[:, None], bias)
        slopes = torch.autograd.grad(found.log_probs.sum(), [hidden, weight])
    assert torch.equal(found.log_probs, expected.log_probs) and torch.equal(found.entropy, expected.entropy)
    assert torch.allclose(letters[:, 0], expected.log_probs, atol=1e-6)
    assert all(map(torch.equal, slopes, torch.autograd.grad(expected.log_probs.sum(), [hidden, weight])))


def test_peak_memory_at_a_vocabulary_of_152000_is_below_a_tenth():
    hidden, weight, targets, _ = make(count=1024, size=32, vocabulary=152_000, biased=False)

    def ours():
        selected_log_probs(hidden, weight, targets).log_probs.sum().backward()

    def theirs():
        logits = hidden @ weight.T
        torch.nn.functional.log_softmax(logits, -1).gather(1, targets[:, None]).sum().backward()

    full = 1024 * 152_000 * 4
    # the plain way, so that the tenth is not of a number that we made up: logits, their log-softmax, a gradient
    assert peak_bytes(theirs) >= 2 * full
    assert peak_bytes(ours) < full / 10


def test_a_frozen_head_allocates_no_gradient_and_no_second_pass():
    hidden, weight, targets, _ = make(count=9, size=64, vocabulary=5000, biased=False)
    with LiveStorages() as storages:
        log_probs = selected_log_probs(hidden, weight, targets, chunk=500).log_probs
        forward = storages.largest
        storages.largest = 0
        log_probs.sum().backward()
    assert weight.grad is None
    assert forward < weight.nbytes / 4
    assert storages.largest <= hidden.nbytes  # nothing as large as a piece's logits: they are not computed again


def test_a_trained_head_computes_its_logits_again_in_pieces():
    hidden, weight, targets, _ = make(count=40, size=8, vocabulary=5000, trained=True, biased=False)
    with LiveStorages() as storages:
        selected_log_probs(hidden, weight, targets, chunk=500).log_probs.sum().backward()
    assert weight.grad is not None
    assert storages.largest == weight.nbytes  # its gradient; logits would be 40 / 8 times that
    assert storages.peak < weight.nbytes + 2.5 * 40 * 500 * 4


def test_without_gradients_nothing_is_kept():
    hidden, weight, targets, _ = make(biased=False)
    with torch.no_grad():
        assert selected_log_probs(hidden, weight, targets).log_probs.grad_fn is None


def test_half_precision_on_a_gpu_sums_in_float32():
    """Shapes and dtypes only: fake tensors compute nothing, and this is not run on a GPU."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with FakeTensorMode():
            hidden, weight = (torch.empty(n, 24, dtype=dtype, device="cuda") for n in (13, 101))
            bias = torch.empty(101, dtype=dtype, device="cuda")
            targets = torch.zeros(13, dtype=torch.int64, device="cuda")
            how = logprob_torch.How(0.7, True, 17, True, "torch")
            scan = logprob_torch.scan_vocabulary(hidden, weight, bias, targets[:, None], how)
            row = scan.top
            slopes = logprob_torch.recompute(hidden, weight, bias, targets, row, row, row, row, how, (True,) * 3)
            assert {x.dtype for x in vars(scan).values()} == {torch.float32}
            assert [(x.shape, x.dtype) for x in slopes] == [(x.shape, dtype) for x in (hidden, weight, bias)]


DOUBLES = {"hidden": torch.zeros(2, 3).double(), "weight": torch.zeros(5, 3).double(), "bias": None}


def broken(**changes):
    hidden, weight, targets, bias = make(count=2, size=3, vocabulary=5)
    return {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias, **changes}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"targets": torch.tensor([0, 5])}, "token id 5"),
        ({"targets": torch.tensor([0, -1])}, "token id -1"),
        ({"targets": torch.tensor([0, 1, 2])}, "(3,)"),
        ({"targets": torch.tensor([0.0, 1.0])}, "float32"),
        ({"targets": torch.zeros(2, 2, dtype=torch.int64)}, "log_probs_of"),
        ({"targets": torch.zeros(2, dtype=torch.int64, device="meta")}, "meta"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"hidden": torch.zeros(2, 3, dtype=torch.bfloat16)}, "bfloat16, float32"),
        ({"hidden": torch.zeros(2, 4)}, "(2, 4)"),
        ({"hidden": torch.zeros(2, 1, 3)}, "(2, 1, 3)"),
        ({"bias": torch.zeros(4)}, "bias (4,)"),
        ({"chunk": 0}, "chunk 0"),
        ({"backend": "cuda"}, "'cuda' is unknown"),
        ({"backend": "triton", **DOUBLES}, "float64"),
    ],
)  # fmt: skip
def test_bad_input_is_named(changes, told):
    with pytest.raises(ValueError) as error:
        selected_log_probs(**broken(**changes))
    assert told in str(error.value)


def test_ids_of_one_token_a_row_are_refused_where_several_are_meant():
    hidden, weight, targets, _ = make()
    with pytest.raises(ValueError, match=r"give \(N, L\)"):
        log_probs_of(hidden, weight, targets)
