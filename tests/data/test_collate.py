from __future__ import annotations

import numpy as np
import pytest
import torch

from truthgpt.data.base import Sample
from truthgpt.data.collate import LMCollator


def sample(*tokens: int) -> Sample:
    values = np.array(tokens, dtype=np.int64)
    return {"input_ids": values[:-1], "labels": values[1:]}


@pytest.mark.parametrize(("multiple", "length"), [(1, 3), (2, 4), (8, 8)])
def test_pads_on_the_right(multiple: int, length: int) -> None:
    batch = LMCollator(9, multiple)([sample(1, 2, 3, 4), sample(5, 6)])
    assert batch["input_ids"].tolist() == [[1, 2, 3] + [9] * (length - 3), [5] + [9] * (length - 1)]
    assert batch["labels"].tolist() == [[2, 3, 4] + [-100] * (length - 3), [6] + [-100] * (length - 1)]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert set(batch) == {"input_ids", "labels"}


def test_a_real_pad_token_stays_a_label() -> None:
    assert LMCollator(9)([sample(1, 9), sample(1, 2, 9)])["labels"].tolist() == [[9, -100], [2, 9]]
