"""The constants: a format's table never changes, so their hashes stand here."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest

from tensorwire.kernels import tables

SHA256 = {
    "NF4_CODE": "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a",
    "FP4_CODE": "b830bcf8857895e5676b8e2ce608a60bb8af9b3ce6270073e9de34814196f09c",
    "INT8_CODE": "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
}


@pytest.mark.parametrize("name", SHA256)
def test_code_tables_equal_those_of_bitsandbytes(name: str) -> None:
    assert hashlib.sha256(getattr(tables, name).astype("<f4").tobytes()).hexdigest() == SHA256[name]


@pytest.mark.parametrize("name", tables.__all__)
def test_constants_are_read_only(name: str) -> None:
    assert not getattr(tables, name).flags.writeable


def test_the_dynamic_map_is_symmetric_but_for_its_last_code() -> None:
    code = tables.INT8_CODE
    assert code[127] == 0 and code[255] == 1
    assert (code[:255] == -code[254::-1]).all()


@pytest.mark.parametrize("name", ["NF4", "INT8"])
def test_a_threshold_is_half_way_between_two_codes(name: str) -> None:
    code, thresholds = getattr(tables, f"{name}_CODE"), getattr(tables, f"{name}_THRESHOLDS")
    assert len(thresholds) == len(code) - 1
    for (lower, upper), threshold in zip(pairwise(code.tolist()), thresholds, strict=True):
        assert lower < threshold < upper
        assert threshold == np.float32(np.float32(lower + upper) / 2)


def test_fp4_thresholds_are_near_the_midpoints_of_its_levels() -> None:
    levels = tables.FP4_CODE[tables.FP4_CODE_OF_LEVEL]
    midpoints = (levels[:-1] + levels[1:]) / np.float32(2)
    ulps = tables.FP4_THRESHOLDS.view(np.int32) - midpoints.view(np.int32)
    assert ulps.tolist() == [14, 0, -1, -1, 0, -6, -1]
