"""Activation maps against hand-worked numbers, captum and torchcam, and the grids of all kinds of layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.functional import LossCapture, OutputCapture, activation_maps, class_answers, feature_map
from tests.cases import cases


def network(inplace: bool = True) -> nn.Sequential:
    """A convolution at "2" that an in-place ReLU follows, and a head that is not linear."""
    torch.manual_seed(3)
    body = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=inplace)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)]
    return nn.Sequential(*body, *head).eval()


IMAGES = torch.randn(3, 1, 7, 9, generator=torch.Generator().manual_seed(0))


def explain(net: nn.Module, layer: nn.Module, images: Tensor = IMAGES) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output of a layer, its gradient and the answers."""
    with OutputCapture(layer) as capture:
        logits = net(images)
    answers = logits.argmax(1)
    (gradient,) = torch.autograd.grad(logits.gather(1, answers[:, None]).sum(), capture.output)
    return capture.output.detach(), gradient, answers


# One channel: A = [[1, 2], [0, 1]], g = [[2, 0], [-1, 1]], so sum A = 4.
A = torch.tensor([[[[1.0, 2.0], [0.0, 1.0]]]])
G = torch.tensor([[[[2.0, 0.0], [-1.0, 1.0]]]])
# alpha = g^2 / (2 g^2 + 4 g^3): 4 / (8 + 32) = 0.1; 0; 1 / (2 - 4), but its relu(g) is 0; 1 / (2 + 4) = 1/6.
PLUS = 0.1 * 2 + 1 / 6


def test_hand_worked() -> None:
    torch.testing.assert_close(activation_maps(A, G), 0.5 * A[:, 0])
    torch.testing.assert_close(activation_maps(A, G, "gradcam++"), PLUS * A[:, 0])
    assert not activation_maps(A, -G).any(), "negative evidence is cut off"


def test_smooth_averages_the_powers_of_the_gradients_over_the_copies() -> None:
    torch.testing.assert_close(activation_maps(A, G[None], "smooth_gradcam++"), activation_maps(A, G, "gradcam++"))
    # Of 2 and 0: means 1, 2 and 4, so alpha = 2 / (2 * 2 + 4 * 4) = 0.1 at the first entry, and 1/6 at the last.
    other = G.clone()
    other[..., 0, 0] = 0.0
    smooth = activation_maps(A, torch.stack([G, other]), "smooth_gradcam++")
    torch.testing.assert_close(smooth, (0.1 * 1 + 1 / 6) * A[:, 0])


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_grad_cam_is_that_of_captum(layer: int) -> None:
    attr = pytest.importorskip("captum.attr")
    net = network()
    activations, gradient, answers = explain(net, net[layer])
    theirs = attr.LayerGradCam(net, net[layer]).attribute(IMAGES, target=answers, relu_attributions=True)
    torch.testing.assert_close(activation_maps(activations, gradient), theirs[:, 0].detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["gradcam", "smooth_gradcam++"])
def test_maps_are_those_of_torchcam(method: str) -> None:
    methods = pytest.importorskip("torchcam.methods")
    net = network(inplace=False)
    net[-1].weight.data.mul_(1000.0)  # torchcam adds 1e-8 to the squares of the gradients
    activations, gradient, answers = explain(net, net[3])
    if method == "gradcam":
        extractor = methods.GradCAM(net, "3", input_shape=(1, 7, 9))
    else:
        torch.manual_seed(1)
        noise = 0.3 * torch.randn(1, *IMAGES.shape)
        with OutputCapture(net[3]) as capture:
            logits = net(IMAGES + noise[0])
        score = logits.gather(1, answers[:, None]).sum()
        gradient = torch.autograd.grad(score, capture.output)[0][None]
        # With one copy and a gradient that is equal in all positions, its deviations from the papers have no effect.
        extractor = methods.SmoothGradCAMpp(net, "3", num_samples=1, std=0.3, input_shape=(1, 7, 9))
    with extractor:
        logits = net(IMAGES.clone().requires_grad_())
        torch.manual_seed(1)
        if method == "gradcam":
            theirs = extractor(answers.tolist(), logits, normalized=False)[0]
        else:  # its maps multiply the weights by the output for the last noisy copy, not for the image
            weights = extractor._get_weights(answers.tolist(), logits)[0]
            theirs = torch.einsum("bk,bkhw->bhw", weights, activations).relu()
    torch.testing.assert_close(activation_maps(activations, gradient, method), theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["gradcam++", "smooth_gradcam++"])
def test_small_gradients_in_half_precision_do_not_vanish(method: str) -> None:
    gradients = (1e-4 * G[None] if method == "smooth_gradcam++" else 1e-4 * G).half()  # whose squares are 0 in float16
    expected = activation_maps(A, gradients.float(), method)
    assert expected.any()
    torch.testing.assert_close(activation_maps(A.half(), gradients, method), expected)


def test_all_calls_of_a_layer_are_kept() -> None:
    relu = nn.ReLU()
    with OutputCapture(relu, only=lambda output: output.dim() == 4) as capture:
        relu(relu(-IMAGES).sum((1, 2, 3)))
        relu(IMAGES)
    assert [each.dim() for each in capture.outputs] == [4, 4]
    torch.testing.assert_close(capture.output, IMAGES.relu())


def test_an_in_place_operation_that_follows_does_not_overwrite_the_output() -> None:
    net, kept = network(), list[Tensor]()
    activations, _, _ = explain(net, net[2])
    assert (activations < 0).any()
    torch.testing.assert_close(activations, net[2](net[1](net[0](IMAGES))).detach())
    handle = net[2].register_forward_hook(lambda layer, args, output: kept.append(output))
    net(IMAGES)
    handle.remove()
    assert not (kept[0] < 0).any(), "the naive way keeps what the ReLU left"


def test_a_frozen_network_and_the_tuple_of_an_attention_have_gradients_too() -> None:
    net = network().requires_grad_(False)
    assert explain(net, net[1])[1].any()
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    with OutputCapture(attention) as capture:
        tokens, weights = attention(*[torch.randn(2, 4, 4)] * 3)
    assert tokens is capture.copies[-1]
    assert weights.shape == (2, 4, 4)
    with OutputCapture(net[1], only=lambda output: False) as skipped:
        net(IMAGES)
    assert skipped.output is None


@cases(
    ("shape", "size", "expected"),
    [
        ((2, 5, 4, 4), (8, 8), (2, 5, 4, 4)),
        ((2, 4, 4, 5), (8, 8), (2, 5, 4, 4)),  # channels last
        ((2, 4, 4, 4), (8, 8), (2, 4, 4, 4)),
        ((2, 5, 1, 1), (8, 8), None),  # pooled
        ((2, 16, 5), (8, 8), (2, 5, 4, 4)),  # tokens
        ((2, 17, 5), (8, 8), (2, 5, 4, 4)),  # with a class token
        ((2, 21, 5), (8, 8), (2, 5, 4, 4)),  # with a class token and four registers
        ((2, 8, 5), (4, 8), (2, 5, 2, 4)),
        ((2, 15, 5), (4, 8), None),
        ((2, 9, 5), (9, 8), (2, 5, 9, 1)),  # one token for each row
        ((2, 42, 5), (100, 120), (2, 5, 6, 7)),  # patches of 16 x 16, and a rest
        ((2, 43, 5), (100, 120), (2, 5, 6, 7)),
        ((2, 44, 5), (100, 120), (2, 5, 6, 7)),
        ((2, 30, 5), (100, 120), (2, 5, 5, 6)),
        ((2, 26, 5), (100, 120), None),
        ((2, 1, 5), (8, 8), None),
        ((16, 2, 5), (8, 8), None),  # not the samples first
        ((2, 7), (8, 8), None),
        ((2, 3, 3, 3, 3), (8, 8), None),
    ],
)
def test_grid_of_a_layer(shape: tuple[int, ...], size: tuple[int, int], expected: tuple[int, ...] | None) -> None:
    found = feature_map(torch.arange(float(torch.Size(shape).numel())).reshape(shape), 2, size)
    assert (None if found is None else tuple(found.shape)) == expected


def test_tokens_are_in_their_places_and_the_class_token_in_none() -> None:
    tokens = torch.arange(7.0).reshape(1, 7, 1)
    assert feature_map(tokens, 1, (2, 3)).tolist() == [[[[1, 2, 3], [4, 5, 6]]]]


@cases(
    ("activations", "gradients", "method", "words"),
    [
        (A, G, "gradcam+", "Did you mean 'gradcam\\+\\+'"),
        (A[0], G[0], "gradcam", r"activations \(B, C, H, W\)"),
        (A, G[..., :1], "gradcam", "of the same shape"),
        (A, G, "smooth_gradcam++", "one for each noisy copy"),
    ],
)
def test_refusals(activations: Tensor, gradients: Tensor, method: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        activation_maps(activations, gradients, method)


# Answers.

LOGITS = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])


def answers_of(loss: str, *arguments: Tensor, **options: object):
    arguments = (arguments[0].clone().requires_grad_(), *arguments[1:])
    with LossCapture(2, keep_graph=True) as capture:
        getattr(F, loss)(*arguments, **options)
    return class_answers(capture.only())


def test_answers_of_each_kind_of_loss() -> None:
    found = answers_of("cross_entropy", LOGITS, torch.tensor([0, -100]))
    assert (found.answers.tolist(), found.labels.tolist(), found.are_right.tolist()) == ([0, 2], [0, -1], [True, False])
    assert found.of(torch.tensor([1, -1])).tolist() == [0.0, 3.0]
    torch.testing.assert_close(found.probabilities, LOGITS.softmax(1))
    soft = answers_of("cross_entropy", LOGITS, torch.tensor([[0.2, 0.8, 0.0], [0.0, 0.0, 1.0]]))
    assert soft.labels.tolist() == [1, 2]
    logs = answers_of("nll_loss", LOGITS.log_softmax(1), torch.tensor([0, 1]))
    torch.testing.assert_close(logs.probabilities, LOGITS.softmax(1))
    several = answers_of("binary_cross_entropy_with_logits", LOGITS, torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    assert (several.answers.tolist(), several.labels.tolist()) == ([0, 2], [2, -1])
    for loss, values in (
        ("binary_cross_entropy_with_logits", torch.tensor([2.0, -1.0])),
        ("binary_cross_entropy", torch.tensor([2.0, -1.0]).sigmoid()),
    ):
        single = answers_of(loss, values, torch.tensor([1.0, 1.0]))
        assert (single.answers.tolist(), single.labels.tolist()) == ([1, 0], [1, 1])
        torch.testing.assert_close(single.of(torch.tensor([-1, 1])), torch.tensor([2.0, -1.0]))


@cases(
    ("loss", "target"),
    [("mse_loss", torch.zeros(2, 3)), ("cross_entropy", torch.zeros(2, 4, dtype=torch.long))],
)
def test_losses_without_class_scores_are_refused(loss: str, target: Tensor) -> None:
    inputs = LOGITS if target.dim() == 2 and target.is_floating_point() else torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=rf"must compare class scores \(B, C\).*B = 2, {loss}"):
        answers_of(loss, inputs, target)
