"""What is counted is what was measured (experiments/README.md, on a GPU)."""

import pytest

from experiments.fits import cheapest, count, memory

# --gradient-checkpointing, samples: GB that were allocated on an H200, without T5 and without a CUDA context
MEASURED = {
    (False, 1): 11.0,
    (False, 8): 34.5,
    (False, 16): 61.2,
    (True, 1): 8.0,
    (True, 8): 10.5,
    (True, 32): 19.1,
}


def test_memory_is_what_an_h200_measured():
    counted = count("SD3.5-Medium")
    assert counted["in_blocks"] + counted["elsewhere"] == pytest.approx(2.243, abs=0.001)
    counted["encoders"] = counted["encoders"][:2]
    for (checkpointing, samples), expected in MEASURED.items():
        parts = memory(counted, ["checkpointing"] * checkpointing, samples=samples)
        assert sum(parts.values()) - 0.5 == pytest.approx(expected, rel=0.015)


SIZES = {"FLUX.2-klein-base-4B": 3.9, "Z-Image": 6.2, "SANA-1.6B": 1.6}  # the others take longer


@pytest.mark.parametrize("name, size", SIZES.items())
def test_published_models_are_counted(name, size):
    """In billions of parameters, as their makers say."""
    counted = count(name)
    assert counted["in_blocks"] + counted["elsewhere"] == pytest.approx(size, abs=0.06)
    saved, checkpointed = counted["saved"]
    assert checkpointed < saved / 5


def test_the_cheapest_flags_are_named():
    counted = dict(in_blocks=10, elsewhere=0, encoders=[1.0], lora=0.01, saved=[10, 1])
    cards = ((80, 1), (33, 1), (26, 1), (18, 1), (11, 1), (7, 8))
    found = [cheapest(counted, size, number) for size, number in cards]
    assert [flags for flags, _ in found] == ["", "O", "C", "C int8", "C nf4", "C S"]
    assert cheapest(counted, 5, 1) is None
