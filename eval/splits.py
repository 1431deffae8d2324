"""Which images train, which choose settings, and which judge: one policy for every evaluation.

    train         the source's training split, or the run's own where that has labels
    test          its test split; or validation, where test is missing or has no labels (ImageNet);
                  or else every fifth training image (kNN: all of them, leave-one-out);
                  `--test-split` names another, or none
    validation    its validation split, where that is not the test split already; or else a tenth of
                  the training images, at most 10,009 (arXiv 2006.07733 App. C.1), drawn by `--seed`

Validation images are needed only where a protocol has something to choose, and nothing else is
chosen on. The classes are those of the training split.
"""

import contextlib

import torch
from torch import Tensor

from common.data import ImageSplit, among, generator, open_split, subset
from common.errors import UserError
from common.plan import NoSplit, Plan, Several

MOST_HELD_OUT = 10_009


def open_labelled(
    plan: Plan, *, test_split: str = "", multilabel: bool = False
) -> tuple[ImageSplit, ImageSplit | None]:
    """The training split and the test split, labelled alike; None where there is no test split.

    Images whose label is missing are left out, which the plan says.

    Args:
        test_split: the split to judge on; "none": none; "": see above.
        multilabel: whether an image may have several labels.

    Raises:
        UserError: no labels, or several of an image, fewer than two classes, or classes in test
            that train lacks.
    """
    source = plan.source
    train = open_split(plan, plan.how.split)
    if train.labels is None and plan.how.split not in ("", "train", "all"):
        with contextlib.suppress(UserError):
            other = open_split(plan, "train")
            plan.notes.append(f"{plan.how.split} has no labels: train is judged with in its place")
            train = other
    if train.labels is None:
        assert train.plan and train.part
        why = train.plan.labels(train.part).why
        raise UserError(f"{source}: has no labels, which an evaluation needs: {why}")
    if train.labels.ndim == 2 and not multilabel:
        raise UserError(
            f"{source}: its images have several labels, which eval.transfer alone judges; "
            "for the others name a column of one label an image (--label-column NAME)"
        )
    train = labelled_part(train)
    assert train.labels is not None
    present = present_in(train.labels)
    if len(present) == 0:
        raise UserError(f"{source}: no image has a label")
    if len(present) < 2:
        only = train.classes[present[0]]
        raise UserError(f"{source}: one class only ({only}); nothing to tell apart")
    test = open_test(plan, train, test_split)
    if test is None:
        return train, None
    if test.labels is None:
        assert test.plan and test.part
        why = test.plan.labels(test.part).why
        raise UserError(
            f"{source}: the test split has no labels ({test.part.name}: {why}); --test-split none "
            "holds out training images in its place, --test-split NAME takes another split"
        )
    check_classes(source, "test", test, train)
    return train, labelled_part(test)


def open_test(plan: Plan, train: ImageSplit, test_split: str) -> ImageSplit | None:
    """The split to judge on: the named one; or test or validation, the first that has labels.

    Raises:
        UserError: the named one is the training split.
    """
    assert train.part
    if train.part.joined and test_split not in ("", "none"):
        raise UserError(
            f"--test-split {test_split}: --split all trains on it too; --split train does not"
        )
    if test_split == "none" or train.part.joined:
        return None
    test = None
    for split in (test_split,) if test_split else ("test", "validation"):
        with contextlib.suppress(NoSplit) if not test_split else contextlib.nullcontext():
            try:
                part = plan.choose(split)
            except Several as error:
                raise UserError(f"{error}, to judge on: --test-split NAME or none") from error
            if part is train.part and test_split:
                raise UserError(f"--test-split {test_split}: is what is trained on")
            if part is not train.part:
                test = open_split(plan, split, train.classes)
                if test.labels is not None:
                    break
    return test


def labelled_part(images: ImageSplit) -> ImageSplit:
    """Those whose label is not missing."""
    return images if images.known is None else subset(images, images.known, "labelled")


def open_train_test(plan: Plan, test_split: str = "") -> tuple[ImageSplit, ImageSplit]:
    """The same; without a test split, a fifth of the training images is held out as one."""
    train, test = open_labelled(plan, test_split=test_split)
    return hold_out_fifth(train) if test is None else (train, test)


def open_validation(plan: Plan, train: ImageSplit, test: ImageSplit) -> ImageSplit | None:
    """The source's own labelled validation split; None where there is none, or it is the test's.

    Raises:
        UserError: it has classes that train lacks.
    """
    try:
        part = plan.choose("validation")
    except NoSplit:
        return None
    except Several as error:
        plan.notes.append(f"{error}: none of them is used")
        return None
    if part in (train.part, test.part) or test.part is train.part:
        return None
    validation = open_split(plan, "validation", train.classes)
    if validation.labels is None:
        return None
    check_classes(plan.source, "validation", validation, train)
    return labelled_part(validation)


def hold_out(count: int, seed: int, pool: Tensor | None = None) -> Tensor:
    """Indices, in order, of a tenth of `count` training images, drawn from those in `pool`.

    Args:
        pool: (P,) indices; default: all.

    Raises:
        UserError: there is one image, and none would be left to train on.
    """
    if count < 2:
        raise UserError("one training image: none is left to choose settings on")
    pool = torch.arange(count) if pool is None else pool
    order = torch.randperm(len(pool), generator=generator(seed, "held out"))
    size = max(1, min(count // 10, MOST_HELD_OUT))
    return pool[order[:size]].sort().values


def to_choose_on(
    train: ImageSplit, own: ImageSplit | None, seed: int, pool: Tensor | None = None
) -> tuple[Tensor, ImageSplit, Tensor]:
    """(N,) images of `train` to train on; and images, with (M,) indices, to choose settings on.

    Args:
        own: the source's own validation split, if there is one.
        pool: see `hold_out`.
    """
    if own is not None:
        return torch.arange(len(train)), own, torch.arange(len(own))
    held_out = hold_out(len(train), seed, pool)
    return (~among(held_out, len(train))).nonzero()[:, 0], train, held_out


def hold_out_fifth(train: ImageSplit) -> tuple[ImageSplit, ImageSplit]:
    """Every fifth image of the classes one after the other, so of each class about a fifth.

    No class is lost to training: the only image of one is kept. At least one image is held out.

    Raises:
        UserError: there is one image of each class.
    """
    assert train.labels is not None
    order = torch.arange(len(train))
    if train.labels.ndim == 1:  # of several labels there is no such order
        order = train.labels.argsort(stable=True)
        order = order[train.labels.bincount()[train.labels[order]] > 1]
    if len(order) < 2:
        raise UserError(f"{train.name}: one image of each class; none can be held out to test on")
    held_out = among(order[4::5] if len(order) > 4 else order[-1:], len(train))
    return subset(train, ~held_out, "4/5 of train"), subset(train, held_out, "1/5 of train")


def check_classes(source: str, name: str, split: ImageSplit, train: ImageSplit) -> None:
    """Refuse a split that has classes which the training images lack.

    Raises:
        UserError: the classes are named.
    """
    assert split.labels is not None and train.labels is not None
    trained = {train.classes[i] for i in present_in(train.labels)}
    unknown = {split.classes[i] for i in present_in(split.labels)} - trained
    if unknown:
        listed = ", ".join(sorted(unknown))
        raise UserError(
            f"{source}: classes in {name} but not in train: {listed}; --test-split none holds out "
            "training images in its place"
        )
    assert split.plan and split.part and train.plan and train.part
    origins = [images.plan.labels(images.part).origin for images in (train, split)]  # type: ignore
    if len(set(origins)) > 1:
        raise UserError(
            f"{source}: the labels of train are by {origins[0]}, those of {name} by {origins[1]}; "
            "--label-column NAME takes one for both"
        )


def present_in(labels: Tensor) -> list[int]:
    """The classes that some image is of."""
    return (
        labels[labels >= 0].unique() if labels.ndim == 1 else labels.any(0).nonzero()[:, 0]
    ).tolist()
