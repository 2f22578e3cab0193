"""What the GPU's path shares with the CPU's; its own tests are in tests/gpu/test_overlap.py."""

import pytest
import torch

from pipeline.capture.transfer import ForwardClock, RowCopies, upload


def test_parts_of_rows_go_where_they_belong() -> None:
    memory = torch.full((10, 3), -1.0)
    rows = torch.arange(15.0).reshape(5, 3)
    copies = RowCopies()
    copies.put(rows, [memory[7:9], memory[0:0], memory[1:4]])
    copies.end_batch()
    copies.finish()
    assert torch.equal(memory[7:9], rows[:2])
    assert torch.equal(memory[1:4], rows[2:])
    assert (memory[[0, 4, 5, 6, 9]] == -1).all()


def test_rows_that_do_not_fit_their_places_are_a_bug() -> None:
    with pytest.raises(RuntimeError):
        RowCopies().put(torch.zeros(5, 3), [torch.zeros(4, 3)])


def test_on_cpu_nothing_is_moved_or_measured() -> None:
    tensor, clock = torch.arange(3), ForwardClock(torch.device("cpu"))
    assert upload(tensor, torch.device("cpu")) is tensor
    with clock.forward():
        pass
    assert clock.idle_share() is None
