"""Swaps and masks of singular vectors, and gradients seen in them, on weights whose answers are known."""

import pytest
import torch
from matrices import matrix

from fastspec.studies.analyze.gradients import CumulativeGradients, spectra
from fastspec.studies.analyze.transplant import Matrices, mask, swap


class OneLayer(torch.nn.Module):
    def __init__(self, w):
        super().__init__()
        self.attention = torch.nn.Linear(*w.shape[::-1], bias=False)
        self.attention.weight = torch.nn.Parameter(w.clone(), requires_grad=False)


WAYS = ("pretrained", "pretrained spans", "random", "random spans", "zero")


def test_swaps_and_masks_change_what_they_should_and_nothing_afterwards():
    w, u, v = (t.float() for t in matrix([8.0, 4.0, 2.0, 1.0], 6, 4))
    other, p, q = (t.float() for t in matrix([3.0, 2.0, 1.0, 0.5], 6, 4, seed=7))
    model = OneLayer(w)
    seen = []

    def score(m):
        seen.append(m.attention.weight.clone())
        return float(m.attention.weight.norm())

    scored = list(
        swap(model, score, {"pretrained": {"attention.weight": other}}, shares=[0.5, 1.0])
    )
    assert [(s.what, s.share) for s in scored] == [
        ("own", 0.0),
        *((what, share) for what in WAYS for share in (0.5, 1.0)),
    ]
    s = torch.tensor([8.0, 4.0, 2.0, 1.0])
    torch.testing.assert_close(seen[0], w)
    half = (p[:, :2] * s[:2]) @ q[:, :2].mT + (u[:, 2:] * s[2:]) @ v[:, 2:].mT
    torch.testing.assert_close(seen[1], half, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[2], (p * s) @ q.mT, atol=1e-5, rtol=0)
    # the leading half as far as it lies in the other leading spans
    part = (u[:, :2] * s[:2]) @ v[:, :2].mT
    inside = p[:, :2] @ p[:, :2].mT @ part @ q[:, :2] @ q[:, :2].mT
    torch.testing.assert_close(seen[3], w - part + inside, atol=1e-5, rtol=0)
    # random vectors are orthonormal: with all of them the singular values stay
    torch.testing.assert_close(torch.linalg.svdvals(seen[6]), s, atol=1e-5, rtol=0)
    assert (seen[6] - w).norm() > 1
    torch.testing.assert_close(seen[9], (u[:, 2:] * s[2:]) @ v[:, 2:].mT, atol=1e-5, rtol=0)
    assert seen[10].abs().max() < 1e-5
    assert torch.equal(model.attention.weight, w)

    masked = {(m.what, m.share): m.score for m in mask(model, score, shares=[0.25])}
    assert masked["leading", 0.25] == pytest.approx(21**0.5, rel=1e-5)
    assert masked["trailing", 0.25] == pytest.approx(84**0.5, rel=1e-5)
    assert torch.equal(model.attention.weight, w)
    with pytest.raises(ValueError, match="no matrix of the kinds mlp"):
        Matrices(model, ["mlp"])


def test_a_swap_uses_the_vectors_of_the_source_it_names():
    w = matrix([4.0, 2.0, 1.0], 5, 3)[0].float()
    given = {
        what: matrix([1.0, 0.5, 0.2], 5, 3, seed)
        for what, seed in (("pretrained", 3), ("other task", 9))
    }
    model, seen = OneLayer(w), []

    def score(m):
        seen.append(m.attention.weight.clone())
        return 0.0

    sources = {what: {"attention.weight": x.float()} for what, (x, _, _) in given.items()}
    scored = [s.what for s in swap(model, score, sources, shares=[1.0])]
    s = torch.tensor([4.0, 2.0, 1.0])
    for what, (_, p, q) in given.items():
        expected = (p.float() * s) @ q.float().mT
        torch.testing.assert_close(seen[scored.index(what)], expected, atol=1e-5, rtol=0)


def test_gradients_are_summed_and_seen_in_the_basis():
    w, u, v = matrix([4.0, 3.0, 2.0], 5, 3)
    summed = 6 * torch.outer(u[:, 0], v[:, 0]) + 2 * torch.outer(u[:, 1], v[:, 1])
    (found,) = spectra({"attention.weight": w}, {"attention.weight": summed}, step=7)
    torch.testing.assert_close(found.s, torch.tensor([6.0, 2.0, 0.0]).double())
    torch.testing.assert_close(found.captured, torch.tensor([36 / 40, 1.0, 1.0]).double())
    assert found.effective_rank() == pytest.approx(64 / 40)
    assert found.step == 7

    model = OneLayer(w.float())
    model.attention.weight.requires_grad_(True)
    recorder = CumulativeGradients(steps=(1,))

    class State:
        global_step = 0

    recorder.on_train_begin(None, State, None, model=model)
    for _ in range(2):
        model.attention.weight.grad = summed.float()
        recorder.on_pre_optimizer_step(None, State, None, model=model)
        State.global_step += 1
    recorder.on_train_end(None, State, None)
    assert [g.step for g in recorder.spectra] == [1, 2]
    assert recorder.spectra[1].s[0].item() == pytest.approx(12, rel=1e-5)
