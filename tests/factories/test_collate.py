from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from truthgpt.factories.collate import COLLATORS


def test_lm_is_built_with_its_option() -> None:
    values = np.array([1, 2, 3], dtype=np.int64)
    sample = {"input_ids": values, "labels": values}
    for options, length in [({}, 3), ({"pad_to_multiple_of": 8}, 8)]:
        collate = COLLATORS.build("lm", options, pad_token_id=7, max_seq_len=16)
        assert collate([sample])["input_ids"].tolist() == [[1, 2, 3] + [7] * (length - 3)]


@pytest.mark.parametrize("options", [{"pad_to_multiple_of": 0}, {"pad_to_multiple_of": "8"}, {"padding": "left"}])
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        COLLATORS.build("lm", options, pad_token_id=7, max_seq_len=16)
