"""Which matrix products there are and what each is for, compared with what autograd's formulas say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_sentinel.attacks.products import Phase, Product, Products

FORWARD, INPUT, WEIGHT = Phase.FORWARD, Phase.BACKWARD_INPUT, Phase.BACKWARD_WEIGHT


class Recorder:
    """Remembers products with their results, and leaves them alone."""

    def __init__(self) -> None:
        self.seen: list[tuple[Product, Tensor]] = []

    def __call__(self, result: Tensor, product: Product) -> Tensor:
        self.seen.append((product, result))
        return result

    @property
    def phases(self) -> list[tuple[str, Phase]]:
        return [(product.kernel, product.phase) for product, _ in self.seen]


def run(module, inputs, autocast=False):
    """Forward and backward, as an engine does them."""
    products, recorder = Products(), Recorder()
    leaf = inputs.requires_grad_()
    with products.seen(recorder, backward=False), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = module(leaf.clone())
    with products.seen(recorder, backward=True):
        output.float().square().sum().backward()
    return recorder


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
# As many rows as columns, so that no shape tells the gradients apart.
@pytest.mark.parametrize("shape", [(8, 8), (2, 4, 8)], ids=str)
def test_the_three_products_of_a_linear_layer(shape, bias, autocast):
    layer = nn.Linear(8, 8, bias)
    inputs = torch.randn(shape)
    recorder = run(layer, inputs, autocast)
    assert recorder.phases == [("addmm" if bias else "mm", FORWARD), ("mm", INPUT), ("mm", WEIGHT)] or recorder.phases == [
        ("addmm" if bias else "mm", FORWARD),
        ("mm", WEIGHT),
        ("mm", INPUT),
    ]
    found = {product.phase: result for product, result in recorder.seen}
    # mm_mat2_grad of a transposed weight is the gradient itself or its transpose.
    assert layer.weight.grad is not None and inputs.grad is not None
    gradient = found[WEIGHT].float()
    assert torch.equal(gradient, layer.weight.grad) or torch.equal(gradient.T, layer.weight.grad)
    torch.testing.assert_close(found[INPUT].float(), inputs.grad.view(8, 8), rtol=1e-2, atol=1e-2)


def test_attention_has_products_of_no_weights():
    def attend(x):
        return torch.softmax(x @ x.mT, dim=-1) @ x

    recorder = run(attend, torch.randn(2, 4, 4))
    assert recorder.phases == [("bmm", FORWARD)] * 2 + [("bmm", INPUT)] * 4


def test_a_stack_of_experts_has_weights_of_three_axes():
    experts = nn.Parameter(torch.randn(3, 4, 5))
    recorder = run(lambda x: torch.bmm(x, experts), torch.randn(3, 2, 4))
    assert sorted(phase.value for _, phase in recorder.phases) == ["backward_input", "backward_weight", "forward"]


def test_a_frozen_weight_has_no_gradient():
    layer = nn.Linear(4, 4).requires_grad_(False)
    assert run(layer, torch.randn(4, 4)).phases == [("addmm", FORWARD), ("mm", INPUT)]


def test_what_is_recomputed_in_the_backward_pass_is_forward():
    layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    recorder = run(lambda x: checkpoint(layers, x, use_reentrant=False), torch.randn(4, 4))
    phases = [phase for _, phase in recorder.phases]
    assert phases.count(FORWARD) == 4 and phases.count(INPUT) == phases.count(WEIGHT) == 2
    numbers = [product.number for product, _ in recorder.seen if product.phase is FORWARD]
    assert numbers == [0, 1, 2, 3]


def test_a_product_is_computed_again_of_other_factors():
    layer = nn.Linear(3, 2)
    recorder = run(layer, torch.randn(5, 3))
    for product, result in recorder.seen:
        assert torch.equal(product.of(product.left, product.right), result)
    first, result = recorder.seen[0]
    torch.testing.assert_close(first.of(2 * first.left, first.right) - layer.bias, 2 * (result - layer.bias))


def test_what_takes_the_place_of_a_result_is_what_the_pass_goes_on_with():
    layers = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False))
    inputs = torch.randn(5, 3)

    def wrong(result: Tensor, product: Product) -> Tensor:
        return -result if product.number == 0 and product.phase is FORWARD else result

    products = Products()
    with products.seen(wrong, backward=False):
        output = layers(inputs)
    hidden = -(inputs @ layers[0].weight.T)
    torch.testing.assert_close(output, hidden @ layers[1].weight.T)
    with products.seen(wrong, backward=True):
        output.sum().backward()
    torch.testing.assert_close(layers[1].weight.grad, torch.ones(5, 2).T @ hidden)
