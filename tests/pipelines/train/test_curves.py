import struct
from pathlib import Path

import pytest

from pipelines.train.curves import draw, picture


def test_every_number_of_the_journal_stands_in_the_event_file_at_its_step(tmp_path: Path) -> None:
    protos = pytest.importorskip("tensorboardX.proto.event_pb2")
    draw(tmp_path, {"step": 1, "loss": 2.5, "lr": 0.001, "grad_norm": None})
    draw(tmp_path, {"step": 1, "eval_loss": 3.5, "eval_rouge-l-f": 0.25})
    draw(tmp_path, {"step": 2, "loss": 1.5})
    (file,) = tmp_path.iterdir()
    data, read = file.read_bytes(), []
    while data:  # TFRecord: length, its checksum, the event, its checksum
        (size,) = struct.unpack("<Q", data[:8])
        event = protos.Event.FromString(data[12 : 12 + size])
        read += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    assert [(step, tag) for step, tag, _ in read] == [
        (1, "train/loss"),
        (1, "train/lr"),
        (1, "eval/loss"),
        (1, "eval/rouge-l-f"),
        (2, "train/loss"),
    ]
    assert [value for _, _, value in read] == pytest.approx([2.5, 0.001, 3.5, 0.25, 1.5])


def test_losses_are_drawn_over_each_other_with_the_recommended_step_marked(tmp_path: Path) -> None:
    from matplotlib.image import imread

    lines = {"training loss": [(1, 3.0), (2, 2.0), (3, 1.0)], "held-out loss": [(1, 3.0), (3, 2.5)]}
    picture(tmp_path / "one.png", lines)
    picture(tmp_path / "other.png", lines, ("recommended: step 3", 3, 2.5))
    one, other = imread(tmp_path / "one.png"), imread(tmp_path / "other.png")
    assert one.shape == other.shape == (600, 1080, 4)
    black = [int((image[:, :, :3].max(axis=2) < 0.1).sum()) for image in (one, other)]
    assert 100 < black[0] < black[1]
