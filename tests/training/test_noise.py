import itertools

import torch

from pid_diffusers.training.noise import draw_batch, generator_for


def draw(*key):
    return draw_batch((64, 1, 8, 8), 80.0, 10, key, torch.device("cpu"))


def test_a_batch_depends_on_its_key_alone():
    torch.manual_seed(1)
    first = draw(0, 0, 5, 0)
    torch.manual_seed(2)
    draw(0, 0, 4, 0)
    second = draw(0, 0, 5, 0)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(torch.rand(3, generator=first[2]), torch.rand(3, generator=second[2]))


def test_seed_rank_step_and_micro_step_all_matter():
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    for a, b in itertools.combinations(keys, 2):
        assert not torch.equal(draw(*a)[0], draw(*b)[0])
        assert not torch.equal(draw(*a)[1], draw(*b)[1])


def test_starts_have_the_standard_deviation_of_the_highest_noise_level():
    z = torch.cat([draw(0, 0, step, 0)[0] for step in range(20)])
    n = z.numel()
    assert abs(z.mean().item()) < 5 * 80 / n**0.5
    assert abs(z.std().item() - 80) < 5 * 80 / (2 * n) ** 0.5


def test_every_grid_point_is_drawn_equally_often():
    indices = torch.cat([draw(0, 0, step, 0)[1] for step in range(100)])
    counts = torch.bincount(indices, minlength=10)
    assert len(counts) == 10
    expected = len(indices) / 10
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_keys_of_another_length_give_another_stream():
    numbers = [torch.rand(4, generator=generator_for(*key)) for key in ((0,), (0, 1), (0, 0xE7A1), (0, 0, 0, 0, 0))]
    for a, b in itertools.combinations(numbers, 2):
        assert not torch.equal(a, b)
