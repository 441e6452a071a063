"""Parts of tasks: the classes, the images and the names that were asked for."""

import pytest
import torch

from nasbench.tasks.fashion_mnist import FashionMNIST
from nasbench.tasks.part import PartOfTask, of_classes
from search_spaces import UserError


def test_classes_are_numbered_anew_with_their_names():
    whole = FashionMNIST()
    part = of_classes(whole, [7, 2], images=50, seed=1)
    train, test = part.split("train"), part.split("test")
    assert part.class_names == ("Sneaker", "Pullover")
    assert part.num_classes == 2
    assert torch.bincount(train.labels).tolist() == [25, 25]
    theirs = whole.split("test")
    rows = (theirs.labels == 7) | (theirs.labels == 2)
    torch.testing.assert_close(test.images, theirs.images[rows])
    assert torch.equal(test.labels, torch.where(theirs.labels[rows] == 7, 0, 1))
    torch.testing.assert_close(part.prepare(test.images[:3]), whole.prepare(test.images[:3]))
    again = of_classes(whole, [7, 2], images=50, seed=1).split("train").images
    assert torch.equal(train.images, again)
    assert not torch.equal(train.images, of_classes(whole, [7, 2], images=50, seed=2).split("train").images)


def test_labels_may_stay():
    part = of_classes(FashionMNIST(), [7, 2], relabel=False)
    assert part.num_classes == 10
    assert sorted(part.split("val").labels.unique().tolist()) == [2, 7]
    assert part.augments == FashionMNIST().augments
    assert isinstance(part, PartOfTask)


@pytest.mark.parametrize(
    ("classes", "images", "message"),
    [([3, 10], 0, r"classes: 10 is not among 0\.\.9"), ([0, 1], 10**6, r"images = 1000000: class 0 has 1200")],
)
def test_what_there_is_not_is_named(classes, images, message):
    with pytest.raises(UserError, match=message):
        of_classes(FashionMNIST(), classes, images=images)
