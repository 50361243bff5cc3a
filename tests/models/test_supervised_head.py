"""Log-probabilities in chunks against the plain formula over all logits."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels import ChunkedLogProbFunction

from vlmtune.models import supervised_head
from vlmtune.models.supervised_head import inside, label_log_probs, rows_per_chunk

WORDS, WIDTH, ROWS = 97, 16, 23


@pytest.fixture(autouse=True)
def chunks_of_five_rows(monkeypatch):
    monkeypatch.setattr(supervised_head, "CHUNK_BYTES", {"cpu": 5 * 4 * WORDS})


class Sizes(TorchDispatchMode):
    """The most numbers that one result has, and how many matrix products there are."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func._schema.name in ("aten::mm", "aten::addmm_")
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def given(rows: int = ROWS, bias: bool = False) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A head, hidden states, labels, and a gradient that differs from row to row."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, WORDS, bias=bias)
    nn.init.normal_(head.weight)
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    return head, hidden, torch.randint(0, WORDS, (rows,)), torch.rand(rows) + 0.1


def plain(head: nn.Module, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = head(hidden).float()
    logs = logits.log_softmax(dim=-1)
    entropy = -(logs.exp() * logs).sum(dim=-1)
    return (
        -F.cross_entropy(logits, labels, reduction="none"),
        entropy,
        logits.argmax(dim=-1) == labels,
    )


def passed(function, head: nn.Module, hidden: Tensor, labels: Tensor, weights: Tensor):
    """Results of a forward pass and, by name, the gradients of a backward pass."""
    head, hidden = copy.deepcopy(head), hidden.detach().requires_grad_(hidden.requires_grad)
    log_probs, entropy, is_top1 = function(head, hidden, labels)
    (log_probs * weights).sum().backward()
    parameters = {"hidden": hidden, **dict(head.named_parameters())}
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    return (log_probs.detach(), entropy, is_top1), gradients


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Within `tolerance` of the largest value."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if expected.numel():
        assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-6)


def assert_same(found, expected, tolerance: float = 1e-6) -> None:
    for ours, theirs in zip(found[0][:2], expected[0][:2], strict=True):
        assert_close(ours, theirs, tolerance)
    assert torch.equal(found[0][2], expected[0][2])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert_close(found[1][name], gradient, tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 7, ROWS])
def test_values_and_gradients_are_those_of_the_plain_formula(rows, bias):
    inputs = given(rows, bias)
    if bias:
        nn.init.normal_(inputs[0].bias)
    found, expected = passed(label_log_probs, *inputs), passed(plain, *inputs)
    assert expected[1].keys() == {"hidden", "weight"} | ({"bias"} if bias else set())
    assert_same(found, expected)


def test_a_label_that_is_nearly_certain_keeps_its_digits():
    head, hidden, labels, weights = given()
    with torch.no_grad():
        head.weight.zero_()
        head.weight[3, 0] = 9.0  # e ** -9 for each of the other words
        hidden.zero_()[:, 0] = 1.0
    labels[:] = 3
    inputs = head, hidden, labels, weights
    assert_same(passed(label_log_probs, *inputs), passed(plain, *inputs), 5e-5)


def test_one_offset_of_all_logits_changes_nothing():
    head, hidden, labels, weights = given(bias=True)
    moved = copy.deepcopy(head)
    with torch.no_grad():
        moved.bias.add_(64)
    found = passed(label_log_probs, moved, hidden, labels, weights)
    assert_same(found, passed(plain, head, hidden, labels, weights), 2e-5)


@pytest.mark.parametrize("frozen", ["weight", "bias", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(frozen):
    head, hidden, labels, weights = given(bias=True)
    {"hidden": hidden, **dict(head.named_parameters())}[frozen].requires_grad_(False)
    found = passed(label_log_probs, head, hidden, labels, weights)
    assert found[1].keys() == {"hidden", "weight", "bias"} - {frozen}
    assert_same(found, passed(plain, head, hidden, labels, weights))


def test_without_rows_every_gradient_is_zero():
    results, gradients = passed(label_log_probs, *given(rows=0, bias=True))
    assert [len(result) for result in results] == [0, 0, 0]
    assert gradients.keys() == {"hidden", "weight", "bias"}
    assert all(gradient.count_nonzero() == 0 for gradient in gradients.values())


def test_only_log_probabilities_carry_a_gradient():
    head, hidden, labels, _ = given()
    log_probs, entropy, is_top1 = label_log_probs(head, hidden, labels)
    assert [x.requires_grad for x in (log_probs, entropy, is_top1)] == [True, False, False]
    assert [x.dtype for x in (log_probs, entropy)] == [torch.float32, torch.float32]


def test_statistics_are_those_of_trls_kernel():
    head, hidden, labels, _ = given()
    with torch.no_grad():
        labels[:9] = head(hidden).argmax(dim=-1)[:9]
        names = ("log_probs", "entropy", "is_top1")
        theirs = ChunkedLogProbFunction.apply(
            hidden, head.weight, None, labels, 1.0, 32, None, 1.0, names
        )
        ours = label_log_probs(head, hidden, labels)
    assert_close(ours[0], theirs[0])
    assert_close(ours[1], theirs[1])
    assert torch.equal(ours[2], theirs[4])
    assert ours[2].sum() == 9


@pytest.mark.parametrize("weights_in", [torch.float32, torch.bfloat16])
def test_in_bfloat16_gradients_are_as_near_the_exact_ones_as_autocasts(weights_in):
    head, hidden, labels, weights = given()
    exact = passed(plain, head.bfloat16().double(), hidden.bfloat16().double(), labels, weights)
    head, hidden = head.to(weights_in), hidden.to(weights_in)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights_in == torch.float32):
        found = passed(label_log_probs, head, hidden, labels, weights)
        usual = passed(plain, head, hidden, labels, weights)
    assert (found[0][0] - usual[0][0]).abs().max() <= 1e-6 * usual[0][0].abs().max()
    for name, gradient in exact[1].items():
        assert found[1][name].dtype == weights_in
        error, theirs = (g[1][name].double() - gradient for g in (found, usual))
        assert 0 < error.norm() <= 1.05 * theirs.norm() <= 0.01 * gradient.norm()


def test_no_tensor_holds_more_than_a_chunk_of_logits():
    head, hidden, labels, weights = given(rows=400)
    assert rows_per_chunk(WORDS, hidden.device) == 5
    with Sizes() as found:
        label_log_probs(head, hidden, labels)[0].mul(weights).sum().backward()
    # The hidden states and the weight themselves are larger than five rows of logits.
    assert found.largest == max(hidden.numel(), head.weight.numel())
    with Sizes() as usual:
        plain(head, hidden, labels)
    assert usual.largest == 400 * WORDS > 6 * found.largest


def test_without_gradients_there_is_one_product_for_each_chunk():
    head, hidden, labels, _ = given(rows=20)
    with torch.no_grad(), Sizes() as found:
        label_log_probs(head, hidden, labels)
    assert found.products == 4


class Model(nn.Module):
    def __init__(self, head: nn.Module):
        super().__init__()
        self.lm_head = head

    def forward(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


@pytest.mark.parametrize("rows", [0, ROWS])
@pytest.mark.parametrize("where", ["target_modules", "modules_to_save"])
def test_adapters_of_the_head_and_a_trained_copy_of_it(where, rows):
    head, hidden, labels, weights = given(rows)
    names = {"target_modules": ["none"], "modules_to_save": None, where: ["lm_head"]}
    if where == "modules_to_save":
        model = nn.ModuleDict({"none": nn.Linear(2, 2), "lm_head": head})
    else:
        model = Model(head)
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **names))
    wrapped = adapted.base_model.model.get_submodule("lm_head")
    found = passed(label_log_probs, wrapped, hidden, labels, weights)
    expected = passed(plain, wrapped, hidden, labels, weights)
    assert {n.rpartition(".default")[0] for n in expected[1] if n != "hidden"} == (
        {"lora_A", "lora_B"} if where == "target_modules" else {"modules_to_save"}
    )
    assert_same(found, expected)


def test_a_trained_copy_is_computed_in_chunks_with_one_gradient():
    head, hidden, labels, _ = given()
    model = nn.ModuleDict({"none": nn.Linear(2, 2), "lm_head": head})
    config = LoraConfig(target_modules=["none"], modules_to_save=["lm_head"])
    wrapped = get_peft_model(model, config).base_model.model.get_submodule("lm_head")
    with Sizes() as sizes:
        label_log_probs(wrapped, hidden, labels)[0].sum().backward()
    assert sizes.largest == max(head.weight.numel(), 5 * WORDS)


def test_hooks_of_a_module_surround_what_runs_inside_it():
    head, order = nn.Linear(2, 3), []
    head.register_forward_pre_hook(lambda *_: order.append("before"))
    head.register_forward_hook(lambda *_: order.append("after"))
    result = inside(head, lambda rows: order.append("inside") or 2 * rows, torch.ones(1, 2))
    assert order == ["before", "inside", "after"]
    assert result.tolist() == [[2, 2]]
    assert "forward" not in vars(head) and head(torch.ones(1, 2)).shape == (1, 3)


def test_a_module_that_fails_inside_has_its_own_forward_again():
    head, replaced = nn.Linear(2, 3), lambda rows: 3 * rows
    head.forward = replaced

    def fail(rows):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        inside(head, fail, torch.ones(1, 2))
    assert head.forward is replaced
