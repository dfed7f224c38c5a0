import pytest
import torch

from parts import optim


@pytest.fixture
def twins():
    torch.manual_seed(0)
    shapes = [(8, 8), (16, 8), (8, 16), (24, 16), (8, 8), (16, 24)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    return ours, [torch.nn.Parameter(p.detach().clone()) for p in ours]


def test_muon_moves_as_torchs_does(twins):
    ours, theirs = twins
    mine = optim.Muon(ours, 0.02, 0.1)
    torchs = torch.optim.Muon(theirs, 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in ours]
        mine.step()
        torchs.step()
        for old, p, q in zip(before, ours, theirs, strict=True):  # torch's update is rounded to bfloat16
            assert (p - q).norm() < 0.05 * (p - old).norm()
            q.data.copy_(p.data)
    torchs.load_state_dict(mine.state_dict())  # a run begun with torch's goes on with ours, and back
    mine.load_state_dict(torchs.state_dict())


def test_muon_batches_as_it_takes_them_alone(twins):
    ours, alone = twins
    together, single = optim.Muon(ours, 0.02, 0.1), optim.Muon(alone, 0.02, 0.1)
    for p, q in zip(ours, alone, strict=True):
        q.grad = p.grad = torch.randn_like(p)
        single.step()
        q.grad = None
    together.step()
    for p, q in zip(ours, alone, strict=True):
        torch.testing.assert_close(p, q)


def test_orthogonal_makes_singular_values_alike():
    torch.manual_seed(0)
    x = torch.randn(3, 12, 30) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    values = torch.linalg.svdvals(optim.orthogonal(x, (3.4445, -4.775, 2.0315), 5))
    assert ((values > 0.5) & (values < 1.5)).all()


def test_a_cpu_orthogonalises_in_float32():
    assert optim.fast_type(torch.device("cpu")) == torch.float32
