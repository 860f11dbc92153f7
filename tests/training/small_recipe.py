"""A recipe that trains in well under a second: five steps an epoch, two epochs."""

RECIPE = {
    "title": "A Ladder in a second",
    "model": {"class_path": "ladderfast.models.LadderNetwork", "init_args": {"layers": [64, 12, 10]}},
    "data": {"class_path": "ladderfast.data.Digits", "init_args": {"num_labels": 40}},
    "objective": {
        "class_path": "ladderfast.training.LadderObjective",
        "init_args": {"denoising_weights": [10, 1, 0.1]},
    },
    "epochs": 2,
    "batch_labelled": 20,
    "batch_unlabelled": 260,  # five steps an epoch
    "accelerator": "cpu",
    "threads": 1,
    "name": "small",
}
