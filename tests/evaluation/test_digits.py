"""What a classifier reads from images, and what a prompt asks for."""

import pytest
import torch

from pid_diffusers.evaluation.digits import NUM_HELD_OUT, DigitClassifier, digit_of, load_digits, to_digits


@pytest.mark.parametrize(
    "prompt, digit",
    [
        ("a handwritten seven", 7),
        ("the digit 7", 7),
        ("Zero", 0),
        ("0!", 0),
        ("7, that is SEVEN", 7),
        ("three of the year 1998", 3),
        ("", None),
        ("a handwritten letter", None),
        ("seventeen", None),
        ("42", None),
        ("someone's weight", None),
        ("a one or a two", None),
        ("the 3 and the four", None),
    ],
)
def test_a_prompt_asks_for_its_only_digit(prompt, digit):
    assert digit_of(prompt) == digit


def test_digits_survive_being_enlarged_and_coloured():
    images, _ = load_digits()
    assert torch.equal(to_digits(images), images)
    large = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    tint = torch.tensor([-0.1, 0.0, 0.1]).view(1, 3, 1, 1)
    torch.testing.assert_close(to_digits(0.9 * large + tint), 0.9 * images)


def test_the_classifier_reads_enlarged_rgb_digits_that_it_never_saw():
    images, labels = (tensor[-NUM_HELD_OUT:] for tensor in load_digits())
    classifier = DigitClassifier()
    assert classifier.accuracy(images, labels) == pytest.approx(0.994, abs=5e-4)
    enlarged = torch.nn.functional.interpolate(images, 16, mode="bicubic").repeat(1, 3, 1, 1)
    assert classifier.accuracy(enlarged, labels) == pytest.approx(0.992, abs=5e-4)
