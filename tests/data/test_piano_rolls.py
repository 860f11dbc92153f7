import numpy as np
import pytest
import torch
from scipy.io import savemat

from ladderfast.data import PianoRolls, piano_rolls
from ladderfast.data.piano_rolls import PianoRollBatches, Rolls

LENGTHS = {"train": (5, 17, 3, 40, 8, 12, 23, 9, 4, 31), "valid": (6, 21), "test": (7, 1, 30)}


def sequences(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.random((steps, 88)) < 0.3).astype(np.uint8) for steps in lengths]


def cells(rolls):
    made = np.empty((1, len(rolls)), dtype=object)
    made[0, :] = rolls
    return made


@pytest.fixture
def made(monkeypatch, tmp_path):
    """A small file that stands for JSB chorales, and its sequences."""
    rolls = {split: sequences(lengths, i) for i, (split, lengths) in enumerate(LENGTHS.items())}
    sizes = tuple((len(lengths), sum(lengths)) for lengths in LENGTHS.values())
    monkeypatch.setitem(piano_rolls.SETS, "jsb_chorales", ("JSB_Chorales.mat", sizes))
    savemat(tmp_path / "JSB_Chorales.mat", {f"{split}data": cells(part) for split, part in rolls.items()})
    return rolls


def read(tmp_path, **options):
    return PianoRolls("jsb_chorales", str(tmp_path), **options)


def batches(tmp_path, size=3, seed=1, **options):
    return read(tmp_path, **options).batches(0, size, seed=seed, dtype=torch.float64)


def epoch_of(found, epoch):
    """The sequences of an epoch, put together again from its batches: {index in the training set: (T, 88)}."""
    whole, running = [], []
    for step in range(len(found)):
        batch = found.get(epoch, step)
        if not batch.continues:
            whole += running
            running = [[] for _ in batch.notes]
        assert len(running) == len(batch.notes)
        for parts, notes, mask in zip(running, batch.notes, batch.mask, strict=True):
            parts.append(notes[mask])
    return [torch.cat(parts) for parts in whole + running]


@pytest.mark.parametrize("truncate", [None, 1, 7, 10, 40, 1000])
def test_an_epoch_has_every_sequence_once_and_whole(made, tmp_path, truncate):
    found = batches(tmp_path, truncate=truncate)
    for epoch in range(2):
        got = sorted(roll.numpy().astype(np.uint8).tobytes() for roll in epoch_of(found, epoch))
        assert got == sorted(roll.tobytes() for roll in made["train"])
    steps = [found.get(0, step).notes.shape[1] for step in range(len(found))]
    assert max(steps) <= (truncate or 40)


def test_what_is_seen_is_the_step_before(made, tmp_path):
    found = batches(tmp_path, truncate=10)
    last = None
    for step in range(len(found)):
        batch = found.get(3, step)
        before = last if batch.continues else torch.zeros_like(batch.notes[:, 0])
        mask = batch.mask
        assert torch.equal(batch.previous[mask[:, 0], 0], before[mask[:, 0]])
        assert torch.equal(batch.previous[:, 1:][mask[:, 1:]], batch.notes[:, :-1][mask[:, 1:]])
        assert not batch.notes[~mask].any()
        assert not batch.previous[~mask].any()
        last = batch.notes[:, -1]


def test_sequences_of_like_length_come_together(made, tmp_path):
    found = batches(tmp_path, size=2)
    filled = [found.get(0, step).mask.double().mean() for step in range(len(found))]
    assert sum(filled) / len(filled) > 0.8  # in the epoch's order alone they would fill 0.66


def test_batches_are_a_function_of_seed_epoch_and_step(made, tmp_path):
    walked, direct = batches(tmp_path, truncate=10), batches(tmp_path, truncate=10)
    for epoch in range(3):
        kept = [walked.get(epoch, step) for step in range(len(walked))]
    for step in reversed(range(len(direct))):
        for got, want in zip(direct.get(2, step), kept[step], strict=True):
            assert torch.equal(got, want)
    for other in (batches(tmp_path, truncate=10, seed=2).get(2, 0), direct.get(1, 0)):
        assert not any(torch.equal(other.notes, batch.notes) for batch in (kept[0], direct.get(2, 1)))


def test_companions_change_from_epoch_to_epoch():
    rolls = {split: Rolls(sequences([9] * 12)) for split in LENGTHS}
    found = PianoRollBatches(rolls, 3, None, seed=1)
    batches_of = [
        {frozenset(roll.numpy().tobytes() for roll in found.get(epoch, step).notes) for step in range(4)}
        for epoch in range(2)
    ]
    assert len(batches_of[0] | batches_of[1]) > 5


@pytest.mark.parametrize(("sequences_of", "steps"), [(1, 5), (2, 100), (32, 256)])
def test_parts_cover_every_time_step_once(made, sequences_of, steps):
    rolls = Rolls(made["test"], dtype=torch.float64)
    parts = list(rolls.parts(sequences_of, steps))
    assert sum(int(part.mask.sum()) for part in parts) == sum(LENGTHS["test"])
    assert sum(float(part.notes.sum()) for part in parts) == sum(roll.sum() for roll in made["test"])
    assert max(part.notes.shape[1] for part in parts) <= steps
    assert [bool(part.continues) for part in parts].count(False) == -(-len(LENGTHS["test"]) // sequences_of)


def test_validation_sequences_join_the_training(made, tmp_path):
    data = read(tmp_path)
    assert data.validation_samples == 2
    joined = data.with_validation_in_training()
    assert joined.validation_samples == 0
    assert [len(roll) for roll in joined.sequences["train"]] == [*LENGTHS["train"], *LENGTHS["valid"]]
    assert joined.sequences["test"] is data.sequences["test"]
    assert len(data.sequences["train"]) == 10  # as it was
    assert len(joined.batches(0, 1, seed=1)) == 12


# What is refused


def broken(rolls, **changes):
    content = {f"{split}data": cells(part) for split, part in rolls.items()} | changes
    return {name: value for name, value in content.items() if value is not None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"testdata": None}, "holds no testdata"),
        ({"traindata": np.zeros((3, 88))}, "traindata must be a cell array of sequences, got float64"),
        (
            {"validdata": cells([np.zeros((4, 87))])},
            r"sequence 1 of validdata must have shape \(time steps, 88\)",
        ),
        (
            {"validdata": cells([np.full((4, 88), 2)])},
            "sequence 1 of validdata must hold zeros and ones only",
        ),
        (
            {"validdata": cells([np.zeros((4, 88))])},
            "validdata has 1 sequences of 4 time steps in all, expected 2 of 27",
        ),
    ],
)
def test_a_foreign_file(made, tmp_path, change, said):
    savemat(tmp_path / "JSB_Chorales.mat", broken(made, **change))
    with pytest.raises(ValueError, match=said):
        read(tmp_path)


@pytest.mark.parametrize("part", [0, 100, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_truncated_file(made, tmp_path, part, compressed):
    path = tmp_path / "JSB_Chorales.mat"
    savemat(path, broken(made), do_compression=compressed)
    content = path.read_bytes()
    path.write_bytes(content[: part if part > 1 else int(part * len(content))])
    with pytest.raises(ValueError, match=r"JSB_Chorales\.mat (cannot be read|is no file of piano rolls)"):
        read(tmp_path)


def test_a_file_of_something_else(made, tmp_path):
    (tmp_path / "JSB_Chorales.mat").write_bytes(b"no music" * 100)
    with pytest.raises(ValueError, match=r"JSB_Chorales\.mat cannot be read as a \.mat file"):
        read(tmp_path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Nottingham\.mat is not in .*data_dir"):
        PianoRolls("nottingham", str(tmp_path))


def test_wrong_arguments(made, tmp_path):
    with pytest.raises(ValueError, match=r"name must be one of jsb_chorales, .*, got 'bach'"):
        PianoRolls("bach")
    with pytest.raises(ValueError, match="truncate must be at least 1 or null, got 0"):
        read(tmp_path, truncate=0)
    data = read(tmp_path)
    for sizes, options, said in (
        ((5, 5), {}, "batch_labelled must be 0"),
        ((0, 0), {}, "batch_unlabelled must be at least 1"),
        ((0, 2), {"world_size": 2}, "devices must be 1"),
    ):
        with pytest.raises(ValueError, match=said):
            data.batches(*sizes, seed=1, **options)
